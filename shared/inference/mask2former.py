"""Mask2Former for inference: the library's parameters and state dict, a forward pass of our own.

Equal to `Mask2FormerForUniversalSegmentation` up to rounding, in less time and a fraction of the memory. What depends
on the shape of the input alone is planned once and kept for the last few shapes; `compute` then has static shapes and
no control flow that depends on data, so it can be compiled or captured for a plan.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import nn
from transformers import Mask2FormerConfig, Mask2FormerModel
from transformers.models.mask2former.modeling_mask2former import Mask2FormerPreTrainedModel

from shared.inference import mask_decoder, pixel_decoder, swin
from shared.inference.linear import linear

PLANS_KEPT = 4
"""Shapes whose plans are kept. A plan takes about 24 bytes per pixel of input: 25 MB at 1024×1024."""


@dataclass(frozen=True)
class Plan:
    """Everything about one shape of input that does not depend on weights; `swin` is None for other backbones."""

    swin: swin.SwinPlan | None
    pixel_decoder: pixel_decoder.PixelDecoderPlan


class SemanticMask2Former(Mask2FormerPreTrainedModel):  # type: ignore[no-untyped-call]  # half typed
    """Mask2Former with its class head, reading the checkpoints of `Mask2FormerForUniversalSegmentation`.

    The library's own class also builds the training loss, which needs scipy. There are no gradients here; training
    goes through `model`, the library's module.
    """

    _keys_to_ignore_on_load_unexpected = [r"^criterion\."]  # noqa: RUF012  # the library's own declaration

    def __init__(self, config: Mask2FormerConfig) -> None:
        super().__init__(config)
        self.model = Mask2FormerModel(config)
        self.class_predictor = nn.Linear(config.hidden_dim, int(config.num_labels or 0) + 1)
        self._plans: OrderedDict[tuple[object, ...], Plan] = OrderedDict()
        self.post_init()  # type: ignore[no-untyped-call]

    def set_precision(self, dtype: torch.dtype) -> None:
        """Hold the matrices of the backbone and the transformer decoder in `dtype`; the rest stays float32.

        Not `.to(dtype)`: the pixel decoder and all norms, residual sums, masks and sampling positions need the full
        mantissa (the original exempts the pixel decoder from autocast; in bfloat16 a sampling position would be off
        by up to half a cell).
        """
        parts = [self.model.transformer_module]
        if swin.is_plain_swin(self.model.pixel_level_module.encoder):
            parts.append(self.model.pixel_level_module.encoder)
        for part in parts:
            for module in part.modules():
                if not isinstance(module, nn.LayerNorm):
                    for parameter in module.parameters(recurse=False):
                        parameter.data = parameter.data.to(dtype)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def plan(self, shape: torch.Size, device: torch.device) -> Plan:
        """The plan for pixels of `shape` (batch, 3, height, width), made now or taken from the last few."""
        key = (*shape, device)
        if key not in self._plans:
            self._plans[key] = self._make_plan(shape, device)
            if len(self._plans) > PLANS_KEPT:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return self._plans[key]

    def _make_plan(self, shape: torch.Size, device: torch.device) -> Plan:
        level = self.model.pixel_level_module
        batch, _, height, width = shape
        sizes = [(-(-height // stride), -(-width // stride)) for stride in self.config.feature_strides]
        windows = None
        if swin.is_plain_swin(level.encoder):
            windows = swin.plan(level.encoder, batch=batch, height=height, width=width, device=device)
        return Plan(windows, pixel_decoder.plan(level.decoder, sizes, device))

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 (batch, 3, h, w) to mask logits (batch, queries, ⌈h / 4⌉, ⌈w / 4⌉) and class logits (batch, queries,
        channels + 1) of the last layer, both float32. The images of a batch fill it without padding.
        """
        return self.compute(pixels, self.plan(pixels.shape, pixels.device))

    def compute(self, pixels: torch.Tensor, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
        """As `forward`, with the plan of the shape of `pixels`: this is what is worth compiling."""
        level, transformer = self.model.pixel_level_module, self.model.transformer_module
        if plan.swin is None:
            maps = [features.permute(0, 2, 3, 1) for features in level.encoder(pixels).feature_maps]
        else:
            maps = swin.feature_maps(level.encoder, pixels, plan.swin)
        levels, finest = pixel_decoder.decode(level.decoder, maps, plan.pixel_decoder)
        projection = level.decoder.mask_projection
        features = mask_decoder.MaskFeatures(finest, projection.weight.flatten(1), projection.bias)
        queries = mask_decoder.decode(
            transformer, levels, plan.pixel_decoder.positions, plan.pixel_decoder.levels.sizes, features
        )
        masks = features.masks(mask_decoder.mask_embeddings(transformer.decoder, queries))
        classes = linear(queries, self.class_predictor.weight, self.class_predictor.bias)
        return masks.view(*masks.shape[:2], *finest.shape[1:3]), classes
