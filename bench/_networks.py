"""Random networks of full size, for benchmarks: ours, and the library's own over the same weights.

Not a benchmark itself. The time and memory of a network do not depend on what its weights are.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors.torch
import torch
import transformers.utils.logging
from torch import nn
from torchvision.models.segmentation import DeepLabV3, deeplabv3_mobilenet_v3_large, deeplabv3_resnet50
from transformers import Mask2FormerConfig, SegformerConfig, SegformerForSemanticSegmentation
from transformers.models.mask2former import modeling_mask2former

from shared.inference.mask2former import SemanticMask2Former
from shared.inference.networks import prepare

Forward = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]

MASK2FORMER_SWIN_LARGE: dict[str, Any] = {
    "num_labels": 150,
    "backbone_config": {
        "model_type": "swin",
        "image_size": 384,
        "embed_dim": 192,
        "depths": [2, 2, 18, 2],
        "num_heads": [6, 12, 24, 48],
        "window_size": 12,
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    },
}
SEGFORMER_B3: dict[str, Any] = {
    "num_labels": 150,
    "depths": [3, 4, 18, 3],
    "hidden_sizes": [64, 128, 320, 512],
    "decoder_hidden_size": 768,
}


class _NoLoss(nn.Module):
    """In place of the training loss, which needs scipy and takes no part in inference."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()


def build_random(mode: str, seed: int = 0) -> Any:
    """The network of a mode with random float32 weights, as it would be read from its files."""
    torch.manual_seed(seed)
    network: nn.Module
    if mode == "sota":
        network = SemanticMask2Former(Mask2FormerConfig(**MASK2FORMER_SWIN_LARGE))
    elif mode == "accurate":
        network = SegformerForSemanticSegmentation(SegformerConfig(**SEGFORMER_B3))
    else:
        network = _build_deeplab(mode)
    _enliven(network)
    return network.eval().requires_grad_(False)


def build_both(mode: str, device: torch.device) -> tuple[Any, Any]:
    """Ours in float32, ready to run, and the library's own of the same weights."""
    network = build_random(mode)
    library = build_library(mode, network).to(device)
    return prepare(network, torch.float32).to(device), library


@torch.no_grad()
def _enliven(network: nn.Module) -> None:
    """Make random weights tell places and queries apart, as trained ones do.

    As they are, a DeepLabV3's activations fade to nothing and the queries of a Mask2Former become one: every image
    would have one class, and its mask would cost nothing.
    """
    if isinstance(network, SemanticMask2Former):
        transformer = network.model.transformer_module
        for embedding in (transformer.queries_features, transformer.queries_embedder):
            embedding.weight.normal_()
        for name, parameter in transformer.decoder.layers.named_parameters():
            if name.endswith(("out_proj.weight", "fc2.weight")):
                parameter.mul_(0.1)
        transformer.get_submodule("decoder.mask_predictor.mask_embedder.2.0").weight.mul_(8)
        network.class_predictor.weight.mul_(10)
    elif isinstance(network, DeepLabV3):
        norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        network.train()(torch.randn((2, 3, 128, 128)))


def build_library(mode: str, network: Any) -> Any:
    """What the library itself would load for a mode: the very tensors of `network`, or of DeepLabV3 copies.

    DeepLabV3 is the library's own class in both, and ours is changed when it is prepared.
    """
    if mode not in ("sota", "accurate"):
        return copy.deepcopy(network)
    library: nn.Module
    with torch.device("meta"):
        if mode == "sota":
            library = build_mask2former(network.config)
        else:
            library = SegformerForSemanticSegmentation(network.config)
    library.load_state_dict(network.state_dict(), assign=True)
    for (name, buffer), (_, source) in zip(library.named_buffers(), network.named_buffers(), strict=True):
        if buffer.is_meta:  # not part of the state dict
            library.get_submodule(name.rpartition(".")[0]).register_buffer(
                name.rpartition(".")[2], source, persistent=False
            )
    return library.eval().requires_grad_(False)


def write_checkpoint(mode: str, network: Any, folder: Path) -> None:
    """Write a network of `build_random` as its checkpoint is published, for `shared.inference.loading`."""
    if mode in ("sota", "accurate"):
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        network.save_pretrained(folder)
    else:
        safetensors.torch.save_file(network.state_dict(), folder / "model.safetensors")


def forward_of(network: nn.Module) -> Forward:
    """Pixels (batch, 3, h, w) to the last raw outputs, as whoever uses the network would call it."""

    def forward(pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = network(pixels)
        if isinstance(output, tuple):
            return output
        if isinstance(output, torch.Tensor):
            return (output,)
        if "masks_queries_logits" in output:
            return output.masks_queries_logits, output.class_queries_logits
        return (output["logits"] if "logits" in output else output["out"],)

    return forward


def build_mask2former(config: Mask2FormerConfig) -> nn.Module:
    library: Any = modeling_mask2former
    network: nn.Module
    with (
        mock.patch.object(library, "Mask2FormerLoss", _NoLoss),
        mock.patch.object(library.Mask2FormerPreTrainedModel, "_init_weights", return_value=None),
    ):
        network = library.Mask2FormerForUniversalSegmentation(config)
    return network


def _build_deeplab(mode: str) -> nn.Module:
    build = deeplabv3_resnet50 if mode == "balanced" else deeplabv3_mobilenet_v3_large
    network: nn.Module = build(weights=None, weights_backbone=None, num_classes=21, aux_loss=False)
    return network
