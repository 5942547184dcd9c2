"""The engine: every mode from image to mask, warm models, checkpoints between stages, and memory running out."""

import dataclasses
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from shared.inference import engine as engine_module
from shared.inference.demo.scenes import draw_scene
from shared.inference.device import choose_device, describe_device
from shared.inference.engine import Engine
from shared.inference.errors import ModelUnavailable, OutOfMemory
from shared.inference.loading import LoadedModel
from shared.inference.modes import MODES
from shared.inference.recipe import Recipe
from tests.unit.inference.conftest import Sources

SMALL = Recipe(input_size=96)


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


def test_images_of_one_input_size_go_through_the_model_together(sources: Sources, photo: NDArray[np.uint8]) -> None:
    engine = Engine(device="cpu", sources=sources, offline=True, batch_images=3)
    # Different images, one of another size, whose input is the same.
    images = [photo, photo[::-1], np.repeat(photo, 2, axis=0).repeat(2, axis=1), 255 - photo]
    seen = watch_batches(engine, "sota")
    made = engine.segment_batch(images, "sota", SMALL)
    assert seen == [3, 1]
    for image, each in zip(images, made, strict=True):
        alone = engine.segment(image, "sota", SMALL)
        assert each.mask.shape == image.shape[:2]
        assert (each.mask == alone.mask).mean() > 0.999, "a batch rounds in another order, and no more"
        assert each.model == alone.model


def test_images_of_several_input_sizes_are_made_one_by_one(sources: Sources, photo: NDArray[np.uint8]) -> None:
    engine = Engine(device="cpu", sources=sources, offline=True, batch_images=4)
    seen = watch_batches(engine, "demo")
    images = [photo, photo[:30]]
    made = engine.segment_batch(images, "demo", SMALL)
    assert seen == [1, 1]
    assert [each.mask.shape for each in made] == [image.shape[:2] for image in images]
    assert engine.segment_batch([], "demo", SMALL) == []


@pytest.mark.parametrize(
    ("recipe", "passes"),
    [
        (Recipe(input_size=128, tta=True), 12),
        (Recipe(input_size=64, tiles=True), 6),
        (Recipe(input_size=96, tiles=True, tta=True), 24),
        (Recipe(resize="published"), 1),
    ],
)
@pytest.mark.parametrize("mode", ["fast", "accurate", "sota"])
def test_every_recipe_gives_a_mask_of_the_images_size(
    mode: str, recipe: Recipe, passes: int, engine: Engine, photo: NDArray[np.uint8]
) -> None:
    made = engine.segment(photo, mode, recipe)
    assert made.mask.shape == photo.shape[:2]
    assert made.mask.max() < len(MODES[mode].labels.classes)
    assert made.model.passes == passes
    assert made.inference_seconds > 0
    assert made.postprocess_seconds > 0
    assert made.warnings == ()
    assert made.confidence is None


def test_tta_of_a_scene_stays_close_to_the_plain_mask(engine: Engine) -> None:
    scene = draw_scene(3, width=300, height=200).image
    plain, averaged = engine.segment(scene, "demo"), engine.segment(scene, "demo", Recipe(tta=True))
    assert 0.9 < (plain.mask == averaged.mask).mean() < 1


def test_a_mirrored_image_has_the_mirrored_mask_with_tta(engine: Engine) -> None:
    scene = draw_scene(3, width=288, height=192).image
    recipe = Recipe(tta=True, input_size=128)
    mirrored = engine.segment(scene[:, ::-1], "demo", recipe).mask[:, ::-1]
    assert (mirrored == engine.segment(scene, "demo", recipe).mask).mean() > 0.999


def test_tiles_show_what_a_small_input_hides(engine: Engine) -> None:
    scene = draw_scene(3, width=768, height=512)
    recipes = {"fit": Recipe(input_size=96), "tiles": Recipe(input_size=352, tiles=True)}
    right = {
        name: (engine.segment(scene.image, "demo", recipe).mask == scene.labels).mean()
        for name, recipe in recipes.items()
    }
    assert right["tiles"] > right["fit"]


def test_confidence_and_unlabeled_pixels_come_from_one_pass(engine: Engine, photo: NDArray[np.uint8]) -> None:
    plain = engine.segment(photo, "demo", SMALL)
    made = engine.segment(photo, "demo", Recipe(input_size=96, confidence=True, unlabeled_below=0.6))
    assert made.confidence is not None
    assert made.confidence.shape == photo.shape[:2]
    unsure = made.confidence < 0.6 * 255
    assert 0 < unsure.mean() < 1
    assert (made.mask[unsure] == 0).all()
    assert (made.mask[~unsure] == plain.mask[~unsure]).all()


def limit_memory(engine: Engine, mode: str, pixels: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Let the model take at most so many input pixels at once; the shapes it was asked for."""
    asked: list[tuple[int, ...]] = []
    predict = LoadedModel.predict

    def refuse(model: LoadedModel, batch: torch.Tensor) -> Any:
        asked.append(tuple(batch.shape))
        if batch.numel() // 3 > pixels:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return predict(model, batch)

    monkeypatch.setattr(LoadedModel, "predict", refuse)
    return asked


def watch_batches(engine: Engine, mode: str) -> list[int]:
    """How many images went through the model of a mode together, each time."""
    engine.warm_up(mode)
    seen: list[int] = []
    network = engine._shelf.take(mode).network  # noqa: SLF001
    network.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
    return seen


def test_a_batch_that_does_not_fit_is_made_one_by_one(
    sources: Sources, photo: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(device="cpu", sources=sources, offline=True, batch_images=4)
    expected = engine.segment(photo, "demo", SMALL)
    width, height = expected.model.input_size
    asked = limit_memory(engine, "demo", width * height, monkeypatch)
    made = engine.segment_batch([photo] * 4, "demo", SMALL)
    assert [shape[0] for shape in asked] == [4, 1, 1, 1, 1]
    assert all(np.array_equal(each.mask, expected.mask) and each.warnings == () for each in made)


def test_an_image_that_does_not_fit_is_made_in_parts_and_says_so(
    sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(device="cpu", sources=sources, offline=True)
    scene = draw_scene(3, width=384, height=384)
    limit_memory(engine, "demo", 250 * 250, monkeypatch)
    made = engine.segment(scene.image, "demo")
    assert "4 overlapping parts" in made.warnings[0]
    assert made.model.passes == 4
    assert (made.mask == scene.labels).mean() > 0.7
    assert engine.segment(scene.image, "demo", Recipe(input_size=128)).warnings == (), "the next one is whole again"


def test_other_models_make_room_before_an_image_is_cut(
    sources: Sources, photo: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(device="cpu", sources=sources, offline=True)
    engine.warm_up("accurate")
    whole = engine.segment(photo, "demo", SMALL)
    predict = LoadedModel.predict

    def refuse_beside_others(model: LoadedModel, batch: torch.Tensor) -> Any:
        if len(engine.loaded) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return predict(model, batch)

    monkeypatch.setattr(LoadedModel, "predict", refuse_beside_others)
    made = engine.segment(photo, "demo", SMALL)
    assert engine.loaded == ("demo",)
    assert np.array_equal(made.mask, whole.mask)
    assert made.warnings == ()


def test_what_fits_in_no_way_says_the_numbers(
    sources: Sources, photo: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(device="cpu", sources=sources, offline=True)
    limit_memory(engine, "demo", 100, monkeypatch)
    with pytest.raises(OutOfMemory, match=r"GiB.*120×90 in mode demo, whole at 448×320 .* 16 parts of at most 160×128"):
        engine.segment(photo, "demo")
    monkeypatch.undo()
    assert engine.segment(photo, "demo").mask.any(), "the engine goes on"


def test_the_model_used_longest_ago_makes_room(sources: Sources, photo: NDArray[np.uint8]) -> None:
    engine = Engine(device="cpu", sources=sources, offline=True)
    for mode in ("fast", "accurate", "demo"):
        engine.segment(photo, mode, SMALL)
    sizes = {mode: engine._shelf.take(mode).weight_bytes for mode in ("fast", "accurate", "demo")}  # noqa: SLF001
    engine = Engine(device="cpu", sources=sources, offline=True, model_bytes=sum(sizes.values()) - 1)
    engine.segment(photo, "fast", SMALL)
    engine.segment(photo, "accurate", SMALL)
    engine.segment(photo, "fast", SMALL)
    engine.segment(photo, "demo", SMALL)
    assert engine.loaded == ("fast", "demo")


def test_a_model_larger_than_the_budget_is_still_used(sources: Sources, photo: NDArray[np.uint8]) -> None:
    engine = Engine(device="cpu", sources=sources, offline=True, model_bytes=1)
    engine.segment(photo, "demo", SMALL)
    engine.segment(photo, "accurate", SMALL)
    assert engine.loaded == ("accurate",)


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


def test_compiled_networks_give_the_same_masks_whatever_the_shape(
    sources: Sources, engine: Engine, photo: NDArray[np.uint8]
) -> None:
    compiled = Engine(device="cpu", sources=sources, offline=True, compiled=True)
    for image in (photo, photo[:, :40], photo[::-1]):
        agreement = compiled.segment(image, "accurate", SMALL).mask == engine.segment(image, "accurate", SMALL).mask
        assert agreement.mean() > 0.999, "sums of another order may tip what lies on a border"


def test_without_a_compiler_an_engine_that_should_compile_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "/nowhere"))  # noqa: SLF001
    torch.compiler.reset()
    with pytest.raises(ValueError, match=r"cannot be compiled here.*compiler"):
        Engine(device="cpu", compiled=True)


def test_the_device_has_a_name_and_a_memory() -> None:
    name, memory = describe_device(torch.device("cpu"))
    assert name
    assert memory > 2**28


def test_a_result_cannot_be_changed(engine: Engine, photo: NDArray[np.uint8]) -> None:
    result = engine.segment(photo, "demo")
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.model = result.model  # type: ignore[misc]
