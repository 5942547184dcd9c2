"""Mask2Former's transformer decoder for inference, over the parameters of `Mask2FormerTransformerModule`.

What the library computes and inference never reads is left out: the masks and attention weights of every layer. What
is linear moves to where it is cheap: the mask of a layer is needed at the size of one level, so the mask features are
resized once per level instead of the masks of every layer, and the projection of the mask features is folded into the
mask embeddings.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from shared.inference.linear import linear


@dataclass(frozen=True)
class MaskFeatures:
    """A map (batch, h, w, feature_size) and the projection that masks are made with, (mask_feature_size, feature_size).

    The projection is applied to the few mask embeddings and never to the map.
    """

    grid: torch.Tensor
    matrix: torch.Tensor
    bias: torch.Tensor

    def resized(self, size: tuple[int, int]) -> "MaskFeatures":
        """The features at another (height, width): the mask of a resized map is the resized mask, both being linear."""
        small = functional.interpolate(self.grid.permute(0, 3, 1, 2), size=size, mode="bilinear")
        return replace(self, grid=small.permute(0, 2, 3, 1))

    def masks(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Mask logits (batch, queries, height × width) of mask embeddings (batch, queries, channels), in float32."""
        embeddings = embeddings.float()
        masks = (embeddings @ self.matrix) @ self.grid.flatten(1, 2).transpose(1, 2)
        masks += (embeddings @ self.bias)[..., None]
        return masks


def decode(
    module: Any,
    levels: list[torch.Tensor],
    positions: torch.Tensor,
    sizes: tuple[tuple[int, int], ...],
    features: MaskFeatures,
) -> torch.Tensor:
    """The queries after the last layer and its norm, float32 (batch, queries, hidden_dim).

    `levels` are float32 (batch, h × w, feature_size) for each (height, width) of `sizes`, coarse to fine, `positions`
    their sine encodings (all tokens, hidden_dim). Layer k attends to level k modulo their number, where the masks of
    the queries before it are positive (arXiv 2112.01527, section 3.2).
    """
    decoder = module.decoder
    dtype = module.level_embed.weight.dtype
    keys, contents = [], []
    for number, (level, places) in enumerate(
        zip(levels, torch.split(positions, [h * w for h, w in sizes]), strict=True)
    ):
        content = _project(module.input_projections[number], level) + module.level_embed.weight[number].float()
        contents.append(content.to(dtype))
        keys.append((content + places).to(dtype))
    small = [features.resized(size) for size in sizes]
    queries = module.queries_features.weight.float().expand(len(levels[0]), -1, -1)
    query_positions = module.queries_embedder.weight.float()
    for number, layer in enumerate(decoder.layers):
        turn = number % len(levels)
        logits = small[turn].masks(mask_embeddings(decoder, norm(decoder.layernorm, queries)))
        queries = _run_layer(layer, queries, query_positions, keys[turn], contents[turn], visible_keys(logits))
    return norm(decoder.layernorm, queries)


def visible_keys(logits: torch.Tensor) -> torch.Tensor:
    """Where mask logits (batch, queries, keys) let a query look: where they are positive, or 0.

    A query that would see nothing looks everywhere; the softmax of nothing would be no number.
    """
    visible = logits >= 0
    return visible | ~visible.any(dim=-1, keepdim=True)


def mask_embeddings(decoder: Any, queries: torch.Tensor) -> torch.Tensor:
    """What the mask features are multiplied with: (batch, queries, mask_feature_size) of normalised queries."""
    for block in decoder.mask_predictor.mask_embedder.layers:
        matrix, activation = block.layers
        queries = activation(linear(queries.to(matrix.weight.dtype), matrix.weight, matrix.bias))
    return queries


def norm(layer: nn.LayerNorm, rows: torch.Tensor) -> torch.Tensor:
    """Layer norm in float32, whatever the dtype of its parameters."""
    return functional.layer_norm(rows, layer.normalized_shape, layer.weight.float(), layer.bias.float(), layer.eps)


def _project(projection: Any, level: torch.Tensor) -> torch.Tensor:
    # The library puts an empty Sequential where the sizes already agree.
    if isinstance(projection, nn.Conv2d):
        weight = projection.weight.flatten(1)
        return linear(level.to(weight.dtype), weight, projection.bias).float()
    return level


def _run_layer(
    layer: Any,
    queries: torch.Tensor,
    positions: torch.Tensor,
    keys: torch.Tensor,
    contents: torch.Tensor,
    visible: torch.Tensor,
) -> torch.Tensor:
    """Masked attention to a level, attention among the queries, and the feed-forward part, each with its residual."""
    dtype = layer.fc1.weight.dtype

    def look(rows: torch.Tensor) -> torch.Tensor:
        cross = layer.cross_attn
        matrices = cross.in_proj_weight.chunk(3)
        biases = cross.in_proj_bias.chunk(3)
        inputs = ((rows + positions).to(dtype), keys, contents)
        projected = [linear(*parts) for parts in zip(inputs, matrices, biases, strict=True)]
        mixed = _mix(*projected, heads=cross.num_heads, visible=visible[:, None])
        return linear(mixed, cross.out_proj.weight, cross.out_proj.bias)

    def confer(rows: torch.Tensor) -> torch.Tensor:
        own = layer.self_attn
        placed = (rows + positions).to(dtype)
        pairs = ((placed, own.q_proj), (placed, own.k_proj), (rows.to(dtype), own.v_proj))
        projected = [linear(inputs, matrix.weight, matrix.bias) for inputs, matrix in pairs]
        return linear(_mix(*projected, heads=own.num_heads, visible=None), own.out_proj.weight, own.out_proj.bias)

    def think(rows: torch.Tensor) -> torch.Tensor:
        hidden = layer.activation_fn(linear(rows.to(dtype), layer.fc1.weight, layer.fc1.bias))
        return linear(hidden, layer.fc2.weight, layer.fc2.bias)

    queries = _residual(queries, look, layer.cross_attn_layer_norm, before=layer.pre_norm)
    queries = _residual(queries, confer, layer.self_attn_layer_norm, before=layer.pre_norm)
    return _residual(queries, think, layer.final_layer_norm, before=layer.pre_norm)


def _residual(
    rows: torch.Tensor, part: Callable[[torch.Tensor], torch.Tensor], layer_norm: nn.LayerNorm, *, before: bool
) -> torch.Tensor:
    return rows + part(norm(layer_norm, rows)) if before else norm(layer_norm, rows + part(rows))


def _mix(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, heads: int, visible: torch.Tensor | None
) -> torch.Tensor:
    """Attention in heads over (batch, tokens, channels); `visible` (batch, 1, queries, keys) is true where it may."""
    query, key, value = (torch.unflatten(part, 2, (heads, -1)).transpose(1, 2) for part in (query, key, value))
    mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=visible)
    return mixed.transpose(1, 2).flatten(2)
