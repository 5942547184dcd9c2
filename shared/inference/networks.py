"""The networks as modules whose output is raw: nothing is upsampled to the input, nothing is kept for training.

What is downloaded or read from disk is the business of weights and loading.
"""

from typing import Any

import torch
from torch import nn
from torchvision.models.segmentation import DeepLabV3, deeplabv3_mobilenet_v3_large, deeplabv3_resnet50
from transformers import Mask2FormerConfig, Mask2FormerModel, SegformerForSemanticSegmentation
from transformers.models.mask2former.modeling_mask2former import Mask2FormerPreTrainedModel

from shared.inference.postprocess import PixelLogits, QueryLogits

_DEEPLABS = {
    "deeplabv3_mobilenet_v3_large": deeplabv3_mobilenet_v3_large,
    "deeplabv3_resnet50": deeplabv3_resnet50,
}


class SemanticMask2Former(Mask2FormerPreTrainedModel):  # type: ignore[no-untyped-call]  # half typed
    """Mask2Former with its class head, reading the checkpoints of `Mask2FormerForUniversalSegmentation`.

    The library's own class also builds the training loss, which needs scipy, and classifies the queries of every
    decoder layer; inference wants the last layer alone.
    """

    _keys_to_ignore_on_load_unexpected = [r"^criterion\."]  # noqa: RUF012  # the library's own declaration

    def __init__(self, config: Mask2FormerConfig) -> None:
        super().__init__(config)
        self.model = Mask2FormerModel(config)
        self.class_predictor = nn.Linear(config.hidden_dim, int(config.num_labels or 0) + 1)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(1, 3, h, w) to mask logits (1, queries, h / 4, w / 4) and class logits (1, queries, channels + 1)."""
        output = self.model(pixels, output_hidden_states=False)
        queries = self.model.transformer_module.decoder.layernorm(output.transformer_decoder_last_hidden_state)
        return output.masks_queries_logits[-1], self.class_predictor(queries)


class FullPrecision(nn.Module):
    """Runs a part in float32 inside an autocast region."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, features: tuple[torch.Tensor, ...], **options: Any) -> Any:
        with torch.autocast(features[0].device.type, enabled=False):
            return self.part([feature.float() for feature in features], **options)


def build_deeplab(architecture: str, *, channels: int) -> DeepLabV3:
    """A DeepLabV3 without its auxiliary head (which only training uses) and without memory for its weights yet."""
    with torch.device("meta"):
        return _DEEPLABS[architecture](weights=None, weights_backbone=None, num_classes=channels, aux_loss=False)


def keep_pixel_decoder_precise(network: SemanticMask2Former) -> None:
    """Exempt the pixel decoder from autocast, as the original does: its sampling positions need the full mantissa."""
    level = network.model.pixel_level_module
    level.decoder = FullPrecision(level.decoder)


def predict(network: nn.Module, pixels: torch.Tensor) -> PixelLogits | QueryLogits:
    """Run one normalised image, float32 (1, 3, h, w), through a network built or loaded by this package."""
    if isinstance(network, SemanticMask2Former):
        masks, classes = network(pixels)
        return QueryLogits(masks=masks[0], classes=classes[0])
    if isinstance(network, SegformerForSemanticSegmentation):
        return PixelLogits(network(pixels).logits[0])
    if isinstance(network, DeepLabV3):
        # The module's own forward would upsample to the input's size first, and the mask needs the image's.
        return PixelLogits(network.classifier(network.backbone(pixels)["out"])[0])
    raise TypeError(f"{type(network).__name__} is no network of this package")
