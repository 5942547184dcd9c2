"""SegFormer and DeepLabV3 give what their libraries give, before the upsampling to the input."""

from typing import Any

import pytest
import torch
from torch.nn import functional
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large, deeplabv3_resnet50
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from shared.inference.networks import prepare, run


@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (2, 3, 96, 160), (1, 3, 75, 90)])
def test_segformers_logits_equal_the_librarys(shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    settings: dict[str, Any] = {
        "depths": [1, 2, 2, 1],
        "hidden_sizes": [16, 32, 32, 64],
        "num_attention_heads": [1, 2, 2, 4],
        "decoder_hidden_size": 100,
        "num_labels": 12,
    }
    config = SegformerConfig(**settings)
    library: Any = SegformerForSemanticSegmentation(config)
    library.eval()
    norm = library.decode_head.batch_norm
    for tensor in (norm.running_mean, norm.weight.data, norm.bias.data):
        torch.nn.init.normal_(tensor)
    torch.nn.init.uniform_(norm.running_var, 0.5, 2)
    pixels = torch.randn(shape)
    with torch.inference_mode():
        expected = library(pixels).logits
        [found] = run(prepare(library, torch.float32), pixels, torch.float32)
        [half] = run(library, pixels, torch.bfloat16)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4
    assert float((half.float() - expected).abs().mean() / expected.abs().mean()) < 0.05


@pytest.mark.parametrize("build", [deeplabv3_mobilenet_v3_large, deeplabv3_resnet50])
def test_deeplabs_logits_equal_the_librarys(build: type) -> None:
    torch.manual_seed(2)
    library = build(weights=None, weights_backbone=None, num_classes=21, aux_loss=True).eval()
    for module in library.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.bias.data, std=0.2)
            torch.nn.init.uniform_(module.weight.data, 0.5, 1.5)
            module.momentum = 1.0
    library.train()(torch.randn((4, 3, 64, 64)))  # the norms take on what they see
    library.eval()
    pixels = torch.randn((2, 3, 96, 128))
    with torch.inference_mode():
        expected = library(pixels)["out"]
        [found] = run(prepare(library, torch.float32), pixels, torch.float32)
    whole = functional.interpolate(found, size=(96, 128), mode="bilinear")
    assert float((whole - expected).abs().max() / expected.abs().max()) < 1e-4


def test_a_network_of_another_package_is_refused() -> None:
    with pytest.raises(TypeError, match="Linear"):
        run(torch.nn.Linear(1, 1), torch.zeros((1, 3, 8, 8)), torch.float32)
