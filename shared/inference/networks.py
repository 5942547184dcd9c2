"""The networks of the modes behind one call: a batch of pixels in, their raw output out.

Nothing is upsampled to the input and nothing is kept for training. What is downloaded or read from disk is the
business of weights and loading.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.segmentation import DeepLabV3, deeplabv3_mobilenet_v3_large, deeplabv3_resnet50
from transformers import SegformerForSemanticSegmentation

from shared.inference.mask2former import SemanticMask2Former
from shared.inference.postprocess import PixelLogits, QueryLogits
from shared.inference.segformer import segformer_logits

Output: TypeAlias = tuple[torch.Tensor, ...]
"""Of a batch: the masks and the classes of queries, or the logits of channels alone, as postprocess describes them."""

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


def run(network: nn.Module, pixels: torch.Tensor, dtype: torch.dtype) -> Output:
    """Put normalised images of one size, float32 (batch, 3, h, w), through a prepared network.

    `dtype` is the one the network was prepared for. Raises TypeError for a network of another package.
    """
    if isinstance(network, SemanticMask2Former):
        return network(pixels)  # type: ignore[no-any-return]  # torch's modules are callables of anything
    with torch.autocast(pixels.device.type, dtype=dtype, enabled=dtype != torch.float32):
        if isinstance(network, SegformerForSemanticSegmentation):
            return (segformer_logits(network, pixels),)
        if isinstance(network, DeepLabV3):
            # The module's own forward would upsample to the input's size first, and the mask needs the image's.
            pixels = pixels.contiguous(memory_format=torch.channels_last)
            return (network.classifier(network.backbone(pixels)["out"]),)
    raise TypeError(f"{type(network).__name__} is no network of this package")


def check_compiler(device: torch.device) -> None:
    """Compile something small. Raises ValueError where that cannot be done, as without a C++ compiler."""
    try:
        torch.compile(torch.sin)(torch.ones(1, device=device))
    except Exception as error:  # torch has a score of them for this
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"networks cannot be compiled here: {reason}") from error


def compile_run(network: nn.Module, dtype: torch.dtype, device: torch.device) -> Callable[[torch.Tensor], Output]:
    """`run` of one network, compiled anew for every shape of input: a minute or more once, sooner done after that.

    torch keeps eight such programs for all networks together; what comes after them runs as it is. On CUDA the kernels
    are replayed as one graph, without a launch for each of them.
    """
    compiled = torch.compile(
        partial(run, network, dtype=dtype), dynamic=False, mode="reduce-overhead" if device.type == "cuda" else None
    )

    def replay(pixels: torch.Tensor) -> Output:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        # The next replay writes over what this one gives back.
        return tuple(output.clone() for output in compiled(pixels))

    return replay if device.type == "cuda" else compiled


def split(outputs: Output) -> list[PixelLogits] | list[QueryLogits]:
    """What `run` gave, image by image."""
    if len(outputs) == 1:
        return [PixelLogits(planes) for planes in outputs[0]]
    return [QueryLogits(masks=masks, classes=classes) for masks, classes in zip(*outputs, strict=True)]
