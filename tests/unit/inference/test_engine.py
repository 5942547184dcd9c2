"""The engine: every mode from image to mask, warm models, checkpoints between stages, and memory running out."""

import dataclasses
from typing import NoReturn

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from shared.inference import engine as engine_module
from shared.inference.device import choose_device, describe_device
from shared.inference.engine import Engine
from shared.inference.errors import ModelUnavailable, OutOfMemory
from shared.inference.modes import MODES
from shared.inference.recipe import Recipe
from tests.unit.inference.conftest import Sources


@pytest.fixture(scope="module")
def engine(sources: Sources) -> Engine:
    return Engine(device="cpu", sources=sources, offline=True)


@pytest.mark.parametrize("mode", ["fast", "balanced", "accurate", "sota", "demo"])
def test_every_mode_gives_a_mask_of_its_classes_at_the_images_own_size(
    mode: str, engine: Engine, photo: NDArray[np.uint8]
) -> None:
    result = engine.segment(photo, mode, Recipe(input_size=128))
    assert result.mask.shape == photo.shape[:2]
    assert result.mask.dtype == np.uint8
    assert result.mask.min() >= MODES[mode].channel_offset
    assert result.mask.max() < len(MODES[mode].labels.classes)
    assert result.model.name == MODES[mode].title
    assert result.model.label_space == MODES[mode].label_space
    assert result.model.revision.startswith("sha256:")
    assert result.model.dtype == "float32"
    assert result.model.input_size == (160, 96)
    assert result.inference_seconds > 0
    assert result.postprocess_seconds > 0
    assert result.peak_gpu_bytes == 0
    assert mode in engine.loaded


def test_a_model_stays_warm_and_answers_the_same(sources: Sources, photo: NDArray[np.uint8]) -> None:
    engine = Engine(device="cpu", sources=sources, offline=True)
    assert not engine.loaded
    engine.warm_up("demo")
    assert engine.loaded == ("demo",)
    first = engine.segment(photo, "demo")
    small = engine.segment(photo[:33, :20], "demo", Recipe(input_size=64))
    again = engine.segment(photo, "demo")
    assert first.load_seconds < 0.05
    assert small.mask.shape == (33, 20)
    assert np.array_equal(first.mask, again.mask), "an image of another size in between changes nothing"


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 300, 3), (700, 2, 3), (31, 33, 3)])
@pytest.mark.parametrize("mode", ["accurate", "demo"])
def test_images_of_any_shape_are_labelled(mode: str, shape: tuple[int, int, int], engine: Engine) -> None:
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert engine.segment(image, mode, Recipe(input_size=64)).mask.shape == shape[:2]


def test_the_modes_own_input_size_is_the_default(engine: Engine) -> None:
    square = np.zeros((50, 50, 3), dtype=np.uint8)
    side = MODES["demo"].input_size
    assert engine.segment(square, "demo").model.input_size == (side, side)


class Stop(Exception):
    """What a canceled job raises."""


@pytest.mark.parametrize("at", [1, 2, 3, 4, 5])
def test_a_checkpoint_can_stop_before_every_stage(at: int, sources: Sources, photo: NDArray[np.uint8]) -> None:
    engine = Engine(device="cpu", sources=sources, offline=True)
    calls = 0

    def checkpoint() -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise Stop

    with pytest.raises(Stop):
        engine.segment(photo, "demo", checkpoint=checkpoint)
    assert engine.loaded == (() if at == 1 else ("demo",))
    assert engine.segment(photo, "demo").mask.shape == photo.shape[:2], "the engine is sound afterwards"


def test_a_mode_without_weights_is_unavailable_and_the_others_go_on(photo: NDArray[np.uint8]) -> None:
    engine = Engine(device="cpu", sources={"sota": ("/no/such/folder", None)}, offline=True)
    with pytest.raises(ModelUnavailable, match="/no/such/folder"):
        engine.segment(photo, "sota")
    assert engine.segment(photo, "demo").mask.any()
    assert engine.loaded == ("demo",)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to"),
        MemoryError(),
    ],
)
def test_an_allocator_that_gives_up_is_out_of_memory(
    error: Exception, engine: Engine, photo: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    def give_up(*_: object, **__: object) -> NoReturn:
        raise error

    monkeypatch.setattr(engine_module, "to_input", give_up)
    with pytest.raises(OutOfMemory, match="120×90 in mode demo") as raised:
        engine.segment(photo, "demo")
    assert raised.value.__cause__ is error


def test_other_runtime_errors_are_not_taken_for_lack_of_memory(
    engine: Engine, photo: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(*_: object, **__: object) -> NoReturn:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(engine_module, "to_input", break_down)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        engine.segment(photo, "demo")


def test_an_allocation_beyond_the_machine_is_out_of_memory(
    engine: Engine, photo: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask_for_a_petabyte(*_: object, **__: object) -> torch.Tensor:
        return torch.empty(2**50, dtype=torch.uint8)

    monkeypatch.setattr(engine_module, "to_input", ask_for_a_petabyte)
    with pytest.raises(OutOfMemory):
        engine.segment(photo, "demo")


def test_a_mirrored_or_read_only_view_is_as_good_as_a_copy(engine: Engine, photo: NDArray[np.uint8]) -> None:
    mirrored = photo[:, ::-1]
    expected = engine.segment(mirrored.copy(), "demo").mask
    assert np.array_equal(engine.segment(mirrored, "demo").mask, expected)
    locked = mirrored.copy()
    locked.setflags(write=False)
    assert np.array_equal(engine.segment(locked, "demo").mask, expected)


@pytest.mark.parametrize("image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3))])
def test_only_rgb_bytes_are_taken(image: NDArray[np.uint8], engine: Engine) -> None:
    with pytest.raises(ValueError, match="uint8"):
        engine.segment(image, "demo")


def test_an_unknown_mode_is_named_with_the_known_ones(engine: Engine, photo: NDArray[np.uint8]) -> None:
    with pytest.raises(ValueError, match=r"'fastest'.*sota"):
        engine.segment(photo, "fastest")


def test_unknown_devices_and_precisions_are_refused() -> None:
    with pytest.raises(ValueError, match="float8"):
        Engine(device="cpu", dtype="float8")
    with pytest.raises(ValueError, match="gpu"):
        Engine(device="gpu")
    with pytest.raises(ValueError, match="CUDA"):
        choose_device("cuda:97")


def test_bfloat16_on_a_cpu_agrees_with_single_precision(engine: Engine, photo: NDArray[np.uint8]) -> None:
    half = Engine(device="cpu", dtype="bfloat16", offline=True).segment(photo, "demo")
    single = engine.segment(photo, "demo")
    assert half.model.dtype == "bfloat16"
    assert (half.mask == single.mask).mean() > 0.95


def test_the_device_has_a_name_and_a_memory() -> None:
    name, memory = describe_device(torch.device("cpu"))
    assert name
    assert memory > 2**28


def test_a_result_cannot_be_changed(engine: Engine, photo: NDArray[np.uint8]) -> None:
    result = engine.segment(photo, "demo")
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.model = result.model  # type: ignore[misc]
