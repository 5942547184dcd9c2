"""Mask2Former's pixel decoder for inference, over the parameters of the library's `Mask2FormerPixelDecoder`.

Always in float32, as in the original, where it is exempt from autocast. Tokens keep their channels last throughout;
the feature maps of the backbone are given up as soon as they are used.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from shared.inference.deformable import Levels, plan_levels, sample
from shared.inference.linear import linear, rows_at_once


@dataclass(frozen=True)
class PixelDecoderPlan:
    """What depends on the shape alone: the levels, coarse to fine, and the sine positions of their tokens."""

    levels: Levels
    positions: torch.Tensor


def sine_positions(height: int, width: int, channels: int, device: torch.device) -> torch.Tensor:
    """The position encoding of a map, float32 (height × width, channels): half for y, half for x.

    Sines and cosines of positions scaled to (0, 2π], in geometrically spaced frequencies (arXiv 1706.03762, section
    3.5, in the two-dimensional form of DETR).
    """
    number = torch.arange(channels // 2, dtype=torch.float32)
    periods = 10_000 ** (2 * (number // 2) / (channels // 2))
    halves = []
    for length in (height, width):
        place = torch.arange(1, length + 1, dtype=torch.float32) / (length + 1e-6) * (2 * torch.pi)
        angles = place[:, None] / periods
        halves.append(torch.stack([angles[:, 0::2].sin(), angles[:, 1::2].cos()], dim=-1).flatten(1))
    down, across = halves
    grid = torch.cat([down[:, None].expand(-1, width, -1), across[None].expand(height, -1, -1)], dim=-1)
    return grid.flatten(0, 1).to(device)


def plan(decoder: Any, sizes: list[tuple[int, int]], device: torch.device) -> PixelDecoderPlan:
    """The plan for feature maps of these (height, width), fine to coarse as the backbone gives them."""
    coarse_first = tuple(reversed(sizes[-decoder.num_feature_levels :]))
    channels = decoder.config.feature_size
    positions = torch.cat([sine_positions(height, width, channels, device) for height, width in coarse_first])
    return PixelDecoderPlan(plan_levels(coarse_first, device), positions)


def decode(decoder: Any, maps: list[torch.Tensor], plan: PixelDecoderPlan) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Feature maps (batch, h, w, channels), fine to coarse, to the levels for attention and the finest map.

    Empties `maps`. The levels are float32 (batch, h × w, feature_size), coarse to fine; the finest map is (batch, h,
    w, feature_size) at the common stride, before the mask projection (which is folded into the mask embeddings).
    """
    laterals = maps[: decoder.num_fpn_levels]
    tokens = _embed_levels(decoder, maps)
    maps.clear()
    # The level's embedding is learned and belongs to the position of each of its tokens.
    level_of = torch.repeat_interleave(
        decoder.level_embed, torch.tensor(plan.levels.counts, device=tokens.device), dim=0, output_size=tokens.shape[1]
    )
    positions = plan.positions + level_of
    for layer in decoder.encoder.layers:
        _run_layer(layer, tokens, positions, plan.levels)
    del positions, level_of
    levels = list(torch.split(tokens, plan.levels.counts, dim=1))
    height, width = plan.levels.sizes[-1]
    finest = torch.unflatten(levels[-1], 1, (height, width))
    for lateral, output in zip(decoder.lateral_convolutions, decoder.output_convolutions, strict=True):
        finest = _refine(lateral, output, laterals.pop(), finest)
    return levels, finest


def _embed_levels(decoder: Any, maps: list[torch.Tensor]) -> torch.Tensor:
    embedded = []
    for projection, features in zip(
        decoder.input_projections, reversed(maps[-decoder.num_feature_levels :]), strict=True
    ):
        convolution, norm = projection
        rows = linear(features, convolution.weight.flatten(1), convolution.bias)
        embedded.append(_group_norm(norm, rows).flatten(1, 2))
    return torch.cat(embedded, dim=1)


def _group_norm(norm: nn.GroupNorm, rows: torch.Tensor) -> torch.Tensor:
    """Over (batch, h, w, channels) with the channels last, and back."""
    planes: torch.Tensor = norm(rows.permute(0, 3, 1, 2))
    return planes.permute(0, 2, 3, 1)


def _run_layer(layer: Any, tokens: torch.Tensor, positions: torch.Tensor, levels: Levels) -> None:
    """One encoder layer in place: every token looks at all levels through the values made of the old tokens."""
    attention = layer.self_attn
    batch, count = tokens.shape[:2]
    values = linear(tokens, attention.value_proj.weight, attention.value_proj.bias)
    values = values.view(batch, count, attention.n_heads, -1)
    shape = (attention.n_heads, attention.n_levels, attention.n_points)
    widest = max(layer.fc1.out_features, 8 * attention.n_heads * attention.n_levels * attention.n_points)
    step = rows_at_once(tokens.device, 4 * widest * batch)
    for start in range(0, count, step):
        chunk = slice(start, min(start + step, count))
        rows = tokens[:, chunk]
        queries = rows + positions[chunk]
        offsets = linear(queries, attention.sampling_offsets.weight, attention.sampling_offsets.bias)
        weights = linear(queries, attention.attention_weights.weight, attention.attention_weights.bias)
        weights = torch.unflatten(weights, 2, (attention.n_heads, -1)).softmax(dim=-1)
        mixed = sample(
            values, torch.unflatten(offsets, 2, (*shape, 2)), torch.unflatten(weights, 3, shape[1:]), levels, chunk
        )
        mixed = linear(mixed, attention.output_proj.weight, attention.output_proj.bias)
        rows = layer.self_attn_layer_norm(rows + mixed)
        hidden = linear(rows, layer.fc1.weight, layer.fc1.bias, "relu")
        tokens[:, chunk] = layer.final_layer_norm(rows + linear(hidden, layer.fc2.weight, layer.fc2.bias))


def _refine(lateral: Any, output: Any, features: torch.Tensor, coarser: torch.Tensor) -> torch.Tensor:
    """A step of the feature pyramid: the lateral map plus the coarser one at its size, through a convolution."""
    convolution, norm = lateral
    rows = _group_norm(norm, linear(features, convolution.weight.flatten(1), convolution.bias))
    size = rows.shape[1:3]
    rows += functional.interpolate(coarser.permute(0, 3, 1, 2), size=size, mode="bilinear").permute(0, 2, 3, 1)
    convolution, norm, _ = output
    rows = convolution(rows.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return _group_norm(norm, rows).relu_()
