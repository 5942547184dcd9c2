"""Tiny checkpoints of every architecture, written as the real ones are and read by the same code."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large, deeplabv3_resnet50
from transformers import Mask2FormerConfig, SegformerConfig, SegformerForSemanticSegmentation
from transformers.utils import logging as transformers_logging

from shared.inference.mask2former import SemanticMask2Former

NAMES = {number: f"class {number}" for number in range(150)}
Sources = dict[str, tuple[str, str | None]]


@pytest.fixture(scope="session", autouse=True)
def _no_progress_bars() -> None:
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks this small gain nothing from threads, which on a busy machine wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_mask2former(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 classes, 20 queries, the hub's file layout."""
    torch.manual_seed(1)
    config = Mask2FormerConfig(
        backbone_config={
            "model_type": "swin",
            "embed_dim": 8,
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 1, 2, 2],
            "window_size": 4,
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        },
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        encoder_layers=1,
        dim_feedforward=32,
        decoder_layers=3,
        num_attention_heads=2,
        num_queries=20,
        id2label=NAMES,
        label2id={name: number for number, name in NAMES.items()},
    )
    folder = tmp_path_factory.mktemp("mask2former")
    SemanticMask2Former(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_segformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(2)
    config = SegformerConfig(
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 16, 16, 16],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
        id2label=NAMES,
        label2id={name: number for number, name in NAMES.items()},
    )
    folder = tmp_path_factory.mktemp("segformer")
    SegformerForSemanticSegmentation(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def random_mobilenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Full size, and with the auxiliary head that the published file has too."""
    torch.manual_seed(3)
    network = deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=21, aux_loss=True)
    folder = tmp_path_factory.mktemp("mobilenet")
    safetensors.torch.save_file(network.state_dict(), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def random_resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(4)
    network = deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=21, aux_loss=False)
    folder = tmp_path_factory.mktemp("resnet")
    safetensors.torch.save_file(network.state_dict(), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def sources(tiny_mask2former: Path, tiny_segformer: Path, random_mobilenet: Path, random_resnet: Path) -> Sources:
    """A local checkpoint for every mode that would otherwise be downloaded."""
    return {
        "fast": (str(random_mobilenet), None),
        "balanced": (str(random_resnet), None),
        "accurate": (str(tiny_segformer), None),
        "sota": (str(tiny_mask2former), None),
    }


@pytest.fixture(scope="session")
def photo() -> NDArray[np.uint8]:
    """A picture with structure at several scales, 120×90, not square and no multiple of anything."""
    rng = np.random.default_rng(5)
    down, across = np.mgrid[0:90, 0:120]
    waves = np.stack([127 + 120 * np.sin(down / 7 + across / (5 + k)) for k in range(3)], axis=2)
    return np.clip(waves + rng.normal(0, 6, waves.shape), 0, 255).astype(np.uint8)
