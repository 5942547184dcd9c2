"""Swin's forward pass for inference, over the parameters of the library's `SwinBackbone`.

The residual stream stays float32 and the layers' matrices decide the precision of the products, as under autocast.
A layer runs to its end on a few windows before it takes the next ones, so that nothing wide ever exists for a whole
map. The order of the tokens is the business of windows.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import SwinBackbone
from transformers.activations import GELUActivation

from shared.inference.linear import linear, rows_at_once
from shared.inference.windows import PLAIN, Chunk, LayerPlan, StagePlan, plan_stage, window_masks


@dataclass(frozen=True)
class SwinPlan:
    """What the forward pass needs to know about one shape of input: the stages, and the masks of shifted windows."""

    stages: tuple[StagePlan, ...]
    masks: torch.Tensor


def is_plain_swin(backbone: nn.Module) -> bool:
    """Whether `feature_maps` computes what this backbone would: a Swin without absolute position embeddings."""
    return (
        isinstance(backbone, SwinBackbone)
        and not backbone.config.use_absolute_embeddings
        and "stem" not in backbone.hidden_states_norms
    )


def plan(backbone: Any, *, batch: int, height: int, width: int, device: torch.device) -> SwinPlan:
    """The plan for pixels (batch, 3, height, width) on `device`."""
    config = backbone.config
    height, width = -(-height // config.patch_size), -(-width // config.patch_size)
    stages = []
    for number in range(len(config.depths)):
        widest = config.embed_dim * 2**number * max(config.mlp_ratio, 3)
        stages.append(
            plan_stage(
                batch=batch,
                height=height,
                width=width,
                window=config.window_size,
                bytes_per_token=int(4 * widest),
                device=device,
            )
        )
        height, width = -(-height // 2), -(-width // 2)
    return SwinPlan(tuple(stages), window_masks(config.window_size, device))


def feature_maps(backbone: Any, pixels: torch.Tensor, plan: SwinPlan) -> list[torch.Tensor]:
    """float32 (batch, 3, h, w) to the normalised map of each stage, float32 (batch, h / 4, w / 4, channels) and on.

    The channels come last. Equal to the library's `feature_maps` up to rounding in float32.
    """
    tokens = _embed(backbone.swin.embeddings, pixels)
    maps = []
    for number, (stage, layout) in enumerate(zip(backbone.swin.encoder.layers, plan.stages, strict=True)):
        tokens = _run_stage(stage, tokens, layout, plan.masks)
        name = f"stage{number + 1}"
        if name in backbone.hidden_states_norms:
            norm = backbone.hidden_states_norms[name]
            maps.append(_norm(norm, tokens).view(layout.batch, layout.height, layout.width, -1))
        if stage.downsample is not None:
            tokens = _merge(stage.downsample, tokens, layout)
    return maps


def _norm(norm: nn.LayerNorm, rows: torch.Tensor) -> torch.Tensor:
    # In float32 whatever the weights' dtype: half precision would lose the small differences of large sums.
    return functional.layer_norm(rows, norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)


def _embed(embeddings: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Patches to float32 tokens (batch × height × width, channels) in raster order."""
    convolution = embeddings.patch_embeddings.projection
    down, across = convolution.kernel_size
    pixels = functional.pad(pixels, (0, -pixels.shape[3] % across, 0, -pixels.shape[2] % down))
    patches = torch.unflatten(torch.unflatten(pixels, 3, (-1, across)), 2, (-1, down)).permute(0, 2, 4, 1, 3, 5)
    weight = convolution.weight.flatten(1)
    rows = linear(patches.reshape(-1, weight.shape[1]).to(weight.dtype), weight, convolution.bias)
    return _norm(embeddings.norm, rows.float())


def _run_stage(stage: Any, tokens: torch.Tensor, plan: StagePlan, masks: torch.Tensor) -> torch.Tensor:
    """All layers of a stage over tokens in raster order; the result is in raster order again."""
    blocks = list(stage.blocks)
    gathers = [plan.enter, *(plan.shift if number % 2 else plan.unshift for number in range(1, len(blocks)))]
    spare = torch.empty_like(tokens)
    for number, (block, gather) in enumerate(zip(blocks, gathers, strict=True)):
        bias = _attention_bias(block.attention, masks if number % 2 else None)
        _run_block(block, tokens, gather, plan.layers[number % 2], bias, spare)
        tokens, spare = spare, tokens
    return torch.index_select(tokens, 0, plan.leave[(len(blocks) - 1) % 2], out=spare)


def _attention_bias(attention: Any, masks: torch.Tensor | None) -> list[torch.Tensor]:
    """The relative position bias for each kind of window, (1, heads, area, area) in the dtype of the products."""
    bias = attention.relative_position_bias().float()
    kinds = [bias] if masks is None else [bias if kind == PLAIN else bias + mask for kind, mask in enumerate(masks)]
    return [kind.to(attention.q_proj.weight.dtype) for kind in kinds]


def _run_block(
    block: Any,
    tokens: torch.Tensor,
    gather: torch.Tensor,
    plan: LayerPlan,
    bias: list[torch.Tensor],
    out: torch.Tensor,
) -> None:
    """One layer, from tokens in any order into `out` in the order of the plan, chunk by chunk."""
    for chunk in plan.chunks:
        rows = out[chunk.tokens]
        rows.copy_(tokens.index_select(0, gather[chunk.tokens]))
        rows += _attend(block.attention, _norm(block.layernorm_before, rows), chunk, bias[chunk.kind])
        rows += _expand(block.mlp, _norm(block.layernorm_after, rows))


def _attend(attention: Any, rows: torch.Tensor, chunk: Chunk, bias: torch.Tensor) -> torch.Tensor:
    """Attention within windows: float32 (tokens, channels) to the same shape in the dtype of the matrices."""
    rows = rows.to(attention.q_proj.weight.dtype)
    if chunk.slots is not None:
        # Swin pads after the norm, so padding takes part as zeros; their projection is the bias of the matrix.
        rows = functional.pad(rows, (0, 0, 0, 1))
    area = bias.shape[-1]
    projected = []
    for matrix in (attention.q_proj, attention.k_proj, attention.v_proj):
        part = linear(rows, matrix.weight, matrix.bias)
        if chunk.slots is not None:
            part = part.index_select(0, chunk.slots)
        projected.append(part.view(-1, area, attention.num_attention_heads, attention.head_dim).transpose(1, 2))
    query, key, value = projected
    mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=attention.scaling)
    mixed = mixed.transpose(1, 2).reshape(-1, query.shape[1] * query.shape[3])
    if chunk.real is not None:
        mixed = mixed.index_select(0, chunk.real)
    return linear(mixed, attention.o_proj.weight, attention.o_proj.bias)


def _expand(mlp: Any, rows: torch.Tensor) -> torch.Tensor:
    rows = rows.to(mlp.fc1.weight.dtype)
    if isinstance(mlp.activation_fn, GELUActivation):
        hidden = linear(rows, mlp.fc1.weight, mlp.fc1.bias, "gelu")
    else:
        hidden = mlp.activation_fn(linear(rows, mlp.fc1.weight, mlp.fc1.bias))
    return linear(hidden, mlp.fc2.weight, mlp.fc2.bias)


def _merge(merging: Any, tokens: torch.Tensor, plan: StagePlan) -> torch.Tensor:
    """Patch merging: squares of four tokens become one of twice the channels, in raster order."""
    grid = tokens.view(plan.batch, plan.height, plan.width, -1)
    grid = functional.pad(grid, (0, 0, 0, plan.width % 2, 0, plan.height % 2))
    _, height, width, channels = grid.shape
    squares = grid.view(plan.batch * height // 2, 2, width // 2, 2, channels)
    weight = merging.reduction.weight
    merged = torch.empty((len(squares) * width // 2, len(weight)), dtype=torch.float32, device=tokens.device)
    step = max(1, rows_at_once(tokens.device, 16 * channels) * 2 // width)
    for top, bottom in pairwise([*range(0, len(squares), step), len(squares)]):
        # Column by column, as the library concatenates them.
        rows = squares[top:bottom].permute(0, 2, 3, 1, 4).reshape(-1, 4 * channels)
        rows = linear(_norm(merging.norm, rows).to(weight.dtype), weight, None)
        merged[top * width // 2 : bottom * width // 2] = rows
    return merged
