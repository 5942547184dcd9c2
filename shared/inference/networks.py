"""The networks of the modes behind one call: a batch of pixels in, the raw output of each image out.

Nothing is upsampled to the input and nothing is kept for training. What is downloaded or read from disk is the
business of weights and loading.
"""

from itertools import pairwise

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.segmentation import DeepLabV3, deeplabv3_mobilenet_v3_large, deeplabv3_resnet50
from transformers import SegformerForSemanticSegmentation

from shared.inference.mask2former import SemanticMask2Former
from shared.inference.postprocess import PixelLogits, QueryLogits
from shared.inference.segformer import segformer_logits

_DEEPLABS = {
    "deeplabv3_mobilenet_v3_large": deeplabv3_mobilenet_v3_large,
    "deeplabv3_resnet50": deeplabv3_resnet50,
}


def build_deeplab(architecture: str, *, channels: int) -> DeepLabV3:
    """A DeepLabV3 without its auxiliary head (which only training uses) and without memory for its weights yet."""
    with torch.device("meta"):
        return _DEEPLABS[architecture](weights=None, weights_backbone=None, num_classes=channels, aux_loss=False)


def prepare(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Make a network that was just read ready to run in `dtype`: evaluation mode, no gradients, the layout it wants.

    Mask2Former then holds half-precision matrices; the others keep float32 weights and run under autocast. The
    convolutions of a DeepLabV3 take in the normalisations that follow them.
    """
    network.eval().requires_grad_(False)
    if isinstance(network, SemanticMask2Former):
        network.set_precision(dtype)
    if isinstance(network, DeepLabV3):
        _fold_norms(network)
        # Convolutions are quicker with the channels last, on a CPU as on tensor cores.
        network.to(memory_format=torch.channels_last)
    return network


def _fold_norms(network: nn.Module) -> None:
    """Put every batch norm that directly follows a convolution into its weights: equal up to rounding.

    On a CPU a norm takes up to half as long as its convolution, and as much memory again.
    """
    for parent in list(network.modules()):
        children = list(parent.named_children())
        for (name, convolution), (norm_name, norm) in pairwise(children):
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, fuse_conv_bn_eval(convolution, norm))
                setattr(parent, norm_name, nn.Identity())


def predict(network: nn.Module, pixels: torch.Tensor, dtype: torch.dtype) -> list[PixelLogits] | list[QueryLogits]:
    """Run normalised images of one size, float32 (batch, 3, h, w), through a prepared network: an output for each.

    `dtype` is the one the network was prepared for. Raises TypeError for a network of another package.
    """
    if isinstance(network, SemanticMask2Former):
        return [QueryLogits(masks=masks, classes=classes) for masks, classes in zip(*network(pixels), strict=True)]
    with torch.autocast(pixels.device.type, dtype=dtype, enabled=dtype != torch.float32):
        if isinstance(network, SegformerForSemanticSegmentation):
            logits = segformer_logits(network, pixels)
        elif isinstance(network, DeepLabV3):
            # The module's own forward would upsample to the input's size first, and the mask needs the image's.
            pixels = pixels.contiguous(memory_format=torch.channels_last)
            logits = network.classifier(network.backbone(pixels)["out"])
        else:
            raise TypeError(f"{type(network).__name__} is no network of this package")
    return [PixelLogits(planes) for planes in logits]
