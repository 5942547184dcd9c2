"""SegFormer for inference: a forward pass of our own over the library's network.

The head (arXiv 2105.15203, section 3.2) projects every level, brings all to the finest size, concatenates, fuses and
normalises. Up to the activation all of it is linear, so here one small matrix per level does it at the level's own
size, which is half of the whole network's arithmetic saved. Channels stay last throughout.
"""

from typing import Any

import torch
from torch.nn import functional
from transformers.activations import GELUActivation

from shared.inference.linear import linear, rows_at_once


def segformer_logits(network: Any, pixels: torch.Tensor) -> torch.Tensor:
    """float32 (batch, 3, h, w) to logits (batch, channels, ⌈h / 4⌉, ⌈w / 4⌉) of a `SegformerForSemanticSegmentation`.

    Equal to the library's up to rounding.
    """
    levels = []
    grid = pixels.permute(0, 2, 3, 1)
    for stage in network.segformer.stages:
        grid = _run_stage(stage, grid)
        levels.append(grid)
    return _decode(network.decode_head, levels)


def _run_stage(stage: Any, grid: torch.Tensor) -> torch.Tensor:
    """(batch, h, w, channels) to the next level, normalised."""
    grid = _convolve(stage.patch_embeddings.proj, grid)
    batch, height, width, _ = grid.shape
    tokens = stage.patch_embeddings.layer_norm(grid.flatten(1, 2))
    for block in stage.blocks:
        tokens = tokens + _attend(block.attention, block.layernorm_before(tokens), height, width)
        tokens += _expand(block.mlp, block.layernorm_after(tokens), height, width)
    normed: torch.Tensor = stage.layer_norm(tokens)
    return normed.view(batch, height, width, -1)


def _convolve(convolution: Any, grid: torch.Tensor) -> torch.Tensor:
    planes: torch.Tensor = convolution(grid.permute(0, 3, 1, 2))
    return planes.permute(0, 2, 3, 1)


def _attend(attention: Any, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Attention of all tokens to a coarser copy of themselves."""
    coarse = tokens
    if attention.sequence_reduction_ratio > 1:
        reduction = attention.sequence_reduction
        grid = _convolve(reduction.sequence_reduction, torch.unflatten(tokens, 1, (height, width)))
        coarse = reduction.layer_norm(grid.flatten(1, 2))
    projected = []
    for matrix, rows in ((attention.q_proj, tokens), (attention.k_proj, coarse), (attention.v_proj, coarse)):
        part = linear(rows, matrix.weight, matrix.bias)
        projected.append(torch.unflatten(part, 2, (attention.num_attention_heads, -1)).transpose(1, 2))
    query, key, value = projected
    mixed = functional.scaled_dot_product_attention(query, key, value, scale=attention.scaling)
    return linear(mixed.transpose(1, 2).flatten(2), attention.o_proj.weight, attention.o_proj.bias)


def _expand(mlp: Any, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    hidden = linear(tokens, mlp.fc1.weight, mlp.fc1.bias)
    hidden = _convolve(mlp.dwconv.dwconv, torch.unflatten(hidden, 1, (height, width))).flatten(1, 2)
    # In place where torch has it: on a CPU, fresh memory costs more than the arithmetic.
    hidden = (
        torch.ops.aten.gelu_(hidden) if isinstance(mlp.activation_fn, GELUActivation) else mlp.activation_fn(hidden)
    )
    return linear(hidden, mlp.fc2.weight, mlp.fc2.bias)


def _decode(head: Any, levels: list[torch.Tensor]) -> torch.Tensor:
    """Levels (batch, h, w, channels), fine to coarse, to logits (batch, channels, h, w) at the finest size."""
    matrices, bias = _fold(head)
    reduced = [
        linear(level, matrix, bias if number == 0 else None)
        for number, (level, matrix) in enumerate(zip(levels, matrices, strict=True))
    ]
    batch, height, width, channels = reduced[0].shape
    classifier = head.classifier
    logits = classifier.bias.expand(batch * height * width, -1).to(torch.float32, copy=True)
    # A few channels at a time: the levels are never all there at full size.
    step = max(32, rows_at_once(logits.device, 4 * len(logits)) if logits.device.type != "cpu" else 96)
    for start in range(0, channels, step):
        group = slice(start, start + step)
        total = reduced[0][..., group].contiguous()
        for level in reduced[1:]:
            coarse = level[..., group].permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
            total += functional.interpolate(coarse, size=(height, width), mode="bilinear").permute(0, 2, 3, 1)
        logits += linear(total.relu_().flatten(0, 2), classifier.weight.flatten(1)[:, group].contiguous(), None)
    planes: torch.Tensor = logits.view(batch, height, width, -1)
    return planes.permute(0, 3, 1, 2)


def _fold(head: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Projection, fusion and batch norm as one matrix (decoder, level) for each level, and one bias for their sum."""
    norm = head.batch_norm
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    bias = norm.bias - norm.running_mean * scale
    matrices = []
    # The library concatenates the coarsest level first.
    parts = reversed(head.linear_fuse.weight.flatten(1).chunk(len(head.linear_projections), dim=1))
    with torch.autocast(scale.device.type, enabled=False):
        for part, projection in zip(parts, head.linear_projections, strict=True):
            scaled = scale[:, None] * part
            matrices.append(scaled @ projection.proj.weight)
            bias = bias + scaled @ projection.proj.bias
    return matrices, bias
