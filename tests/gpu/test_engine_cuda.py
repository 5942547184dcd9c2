"""The engine on a CUDA device: the same answers as on the CPU, its memory measured, and its failures its own."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from shared.inference.demo.scenes import draw_scene
from shared.inference.device import choose_device, describe_device
from shared.inference.engine import Engine
from shared.inference.errors import OutOfMemory
from shared.inference.postprocess import PixelLogits, QueryLogits, label
from shared.inference.recipe import Recipe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device on this machine")


@pytest.fixture(scope="module")
def scene() -> NDArray[np.uint8]:
    return draw_scene(5_000_000, width=1280, height=720).image


def agreement(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
    return float((first == second).mean())


@pytest.mark.parametrize(("dtype", "least"), [("float32", 0.999), ("float16", 0.99), ("bfloat16", 0.97)])
def test_cuda_gives_the_masks_that_the_cpu_gives(scene: NDArray[np.uint8], dtype: str, least: float) -> None:
    reference = Engine(device="cpu", dtype="float32", offline=True).segment(scene, "demo")
    result = Engine(device="cuda", dtype=dtype, offline=True).segment(scene, "demo")
    assert result.model.dtype == dtype
    assert agreement(result.mask, reference.mask) >= least


def test_auto_takes_the_gpu_in_half_precision_and_measures_its_memory(scene: NDArray[np.uint8]) -> None:
    engine = Engine(offline=True)
    engine.warm_up("demo")
    result = engine.segment(scene, "demo")
    assert engine.device.type == "cuda"
    assert result.model.dtype in ("bfloat16", "float16")
    assert result.load_seconds < 0.05
    name, memory = describe_device(engine.device)
    assert result.model.device == name
    assert 0 < result.peak_gpu_bytes < memory


@pytest.mark.parametrize("kind", ["pixels", "queries"])
def test_post_processing_gives_the_same_ids_on_both_devices(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    planes = torch.randn((40, 48, 64), generator=generator) * 4
    classes = torch.randn((40, 151), generator=generator) * 3

    def mask(device: torch.device) -> NDArray[np.uint8]:
        held = planes.to(device)
        prediction = PixelLogits(held) if kind == "pixels" else QueryLogits(held, classes.to(device))
        return label(prediction, size=(1333, 777), channel_offset=1).mask

    assert agreement(mask(choose_device("cpu")), mask(choose_device("cuda"))) > 0.9999


def test_a_device_that_is_full_says_so_and_works_again_afterwards(scene: NDArray[np.uint8]) -> None:
    engine = Engine(device="cuda", offline=True)
    engine.warm_up("demo")
    torch.cuda.set_per_process_memory_fraction(0.001, engine.device)
    try:
        with pytest.raises(OutOfMemory, match="input_size"):
            engine.segment(scene, "demo", Recipe(input_size=2048))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, engine.device)
    assert engine.segment(scene, "demo").mask.shape == scene.shape[:2]
