"""The engine: images in, their masks and the time each stage took out. It keeps the models it has loaded warm.

One engine belongs to one thread. Files are read by media and written by masks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from shared.inference.device import choose_device, choose_dtype
from shared.inference.errors import OutOfMemory
from shared.inference.loading import LoadedModel, load
from shared.inference.memory import DeviceMemory, watch_allocators
from shared.inference.modes import MODES, Mode
from shared.inference.networks import check_compiler
from shared.inference.passes import Pass, plan, split
from shared.inference.postprocess import PixelLogits, QueryLogits, combine, label, proceed
from shared.inference.recipe import DEFAULT, Recipe
from shared.inference.resize import to_input
from shared.inference.shelf import Shelf
from shared.inference.stopwatch import Stopwatch

CUDA_BATCH_IMAGES = 8
MEMORY_SHARE = 0.8
"""Of the free memory, for a batch: what an image took before is no promise of what the next one takes."""
SPLITS = (2, 4)
"""Into how many parts each side is cut when an image does not fit the memory, one try after the other."""

Checkpoint: TypeAlias = Callable[[], None]
Prediction: TypeAlias = PixelLogits | QueryLogits


@dataclass(frozen=True)
class ModelInfo:
    """Exactly what made a mask: `input_size` is (width, height), `revision` the hub's commit or a digest of files.

    Of several passes, `input_size` is that of the largest, and `passes` says how many there were.
    """

    name: str
    revision: str
    dtype: str
    input_size: tuple[int, int]
    passes: int
    device: str
    label_space: str


@dataclass(frozen=True)
class Segmentation:
    """A mask, uint8 (height, width) of class ids at the image's own size, and what it cost.

    `confidence`, if asked for, is uint8 of the same shape (see postprocess.Labels). `load_seconds` is 0 when the model
    was warm; an image of a batch has its share of the batch's seconds. `peak_gpu_bytes` is that of the whole batch,
    0 on a CPU. `warnings` say in what the mask is not what was asked for.
    """

    mask: NDArray[np.uint8]
    confidence: NDArray[np.uint8] | None
    load_seconds: float
    preprocess_seconds: float
    inference_seconds: float
    postprocess_seconds: float
    peak_gpu_bytes: int
    model: ModelInfo
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Task:
    """One image, uint8 RGB (height, width, 3), and the passes it takes."""

    image: NDArray[np.uint8]
    passes: tuple[Pass, ...]

    @property
    def size(self) -> tuple[int, int]:
        return self.image.shape[1], self.image.shape[0]

    @property
    def is_plain(self) -> bool:
        """Whether one pass, and nothing but the image in it, makes the mask."""
        return len(self.passes) == 1 and self.passes[0].size == self.passes[0].padded

    @property
    def input_size(self) -> tuple[int, int]:
        """That of the largest pass."""
        return max((shown.padded for shown in self.passes), key=lambda size: size[0] * size[1])


class Engine:
    """Models on one device.

    `sources` maps a mode to the (folder or hub repository, revision) that takes the place of its own. `dtype` is
    float32, float16 or bfloat16, by default what the device is best at (see choose_dtype). `batch_images` is how many
    images go through a model together, by default 8 on CUDA and 1 on a CPU, which gains nothing. `model_bytes` bounds
    the weights kept in memory, by default half of the device's. `compiled` networks take a minute or more for the
    first image of every input size, and less time for the others. Raises ValueError for a device, a dtype or a
    compiler that is not there.
    """

    def __init__(
        self,
        *,
        device: str = "auto",
        dtype: str | None = None,
        sources: Mapping[str, tuple[str, str | None]] | None = None,
        cache_folder: Path | None = None,
        offline: bool = False,
        batch_images: int | None = None,
        model_bytes: int | None = None,
        compiled: bool = False,
    ) -> None:
        self.device = choose_device(device)
        self.batch_images = batch_images or (CUDA_BATCH_IMAGES if self.device.type == "cuda" else 1)
        self._dtype = choose_dtype(self.device, dtype)
        self._sources = dict(sources or {})
        self._cache_folder = cache_folder
        self._offline = offline
        self._compiled = compiled
        if compiled:
            check_compiler(self.device)
        self._memory = DeviceMemory(self.device)
        self._shelf = Shelf(self._load, budget_bytes=model_bytes or self._memory.total_bytes // 2)
        self._bytes_per_image: dict[tuple[str, tuple[int, int]], int] = {}

    @property
    def loaded(self) -> tuple[str, ...]:
        """The modes whose models are in memory, the one used last at the end."""
        return self._shelf.modes

    def warm_up(self, mode: str) -> None:
        """Load a mode and run it once, so that the first image does not pay for either. Raises as `segment` does."""
        side = _mode(mode).input_size
        self.segment(np.full((side, side, 3), 127, dtype=np.uint8), mode)

    def input_size(self, width: int, height: int, mode: str, recipe: Recipe = DEFAULT) -> tuple[int, int] | None:
        """The (width, height) that an image of this size has for the model; None if it goes through it alone.

        Images for which it is the same can go through the model together. Raises as `segment` does.
        """
        task = _Task(np.empty((height, width, 0), dtype=np.uint8), plan(width, height, _mode(mode), recipe))
        return task.input_size if task.is_plain else None

    def segment(
        self, image: NDArray[np.uint8], mode: str, recipe: Recipe = DEFAULT, *, checkpoint: Checkpoint = proceed
    ) -> Segmentation:
        """Label every pixel of uint8 RGB (height, width, 3) with a class id of the mode's label space.

        `checkpoint` is called between the stages and may raise to stop; what it raises passes through. Raises
        ModelUnavailable, MediaLimit for a recipe that would take too many passes, OutOfMemory when not even small
        parts of the image fit the memory, and ValueError for an unknown mode or an array of another kind.
        """
        [made] = self.segment_batch([image], mode, recipe, checkpoint=checkpoint)
        return made

    def segment_batch(
        self,
        images: Sequence[NDArray[np.uint8]],
        mode: str,
        recipe: Recipe = DEFAULT,
        *,
        checkpoint: Checkpoint = proceed,
    ) -> list[Segmentation]:
        """As `segment`, of several images: those of one `input_size` go through the model together."""
        chosen = _mode(mode)
        tasks = [_Task(image, plan(image.shape[1], image.shape[0], chosen, recipe)) for image in map(_check, images)]
        alike = len({task.input_size for task in tasks}) == 1 and all(task.is_plain for task in tasks)
        together = self._fit_memory(mode, tasks[0].input_size) if alike else 1
        made = []
        for start in range(0, len(tasks), together):
            made += self._make_somehow(tasks[start : start + together], chosen, recipe, checkpoint)
        return made

    def _make_somehow(
        self, tasks: Sequence[_Task], mode: Mode, recipe: Recipe, checkpoint: Checkpoint
    ) -> list[Segmentation]:
        """Make them together; where memory runs out, with other models dropped, one by one, and at last in parts."""
        try:
            return self._make(tasks, mode, recipe, checkpoint)
        except OutOfMemory:
            pass  # and out of here, because the error keeps alive what took the memory
        self._shelf.keep_only(mode.name)
        self._memory.release()
        if len(tasks) > 1:
            return [self._make_somehow([task], mode, recipe, checkpoint)[0] for task in tasks]
        return [self._make_in_parts(tasks[0], mode, recipe, checkpoint)]

    def _make_in_parts(self, task: _Task, mode: Mode, recipe: Recipe, checkpoint: Checkpoint) -> Segmentation:
        cause: BaseException | None = None
        for parts in (1, *SPLITS):
            tried = replace(task, passes=split(task.passes, parts)) if parts > 1 else task
            try:
                [made] = self._make([tried], mode, recipe, checkpoint)
            except OutOfMemory as error:
                cause = error.__cause__
            else:
                warning = f"the memory of the device took the image only in {len(tried.passes)} overlapping parts"
                return replace(made, warnings=(warning,)) if parts > 1 else made
            self._memory.release()
        width, height = task.size
        columns, rows = tried.input_size
        raise OutOfMemory(
            f"{self._memory.describe()} has too little memory for {width}×{height} in mode {mode.name}, whole at "
            f"{task.input_size[0]}×{task.input_size[1]} and even in {len(tried.passes)} parts of at most "
            f"{columns}×{rows}; choose a smaller input_size"
        ) from cause

    def _make(self, tasks: Sequence[_Task], mode: Mode, recipe: Recipe, checkpoint: Checkpoint) -> list[Segmentation]:
        """Plain images of one input size together, or one image of any passes."""
        watch, own = Stopwatch(self.device), [Stopwatch(self.device) for _ in tasks]
        before = self._memory.start_peak()
        with watch_allocators():
            checkpoint()
            with watch.stage("load"):
                model = self._shelf.take(mode.name)
            if tasks[0].is_plain:
                shown = [(task.image, task.passes[0]) for task in tasks]
                predictions = self._predict(shown, model, watch, checkpoint)
                labels = []
                for task, prediction, postprocess in zip(tasks, predictions, own, strict=True):
                    checkpoint()
                    with postprocess.stage("postprocess"):
                        labels.append(label(prediction, **_describe_labels(task, mode, recipe), checkpoint=checkpoint))
            else:
                [task], [postprocess] = tasks, own
                with postprocess.stage("postprocess"):
                    views = self._predict_all(task, model, postprocess, checkpoint)
                    labels = [combine(views, **_describe_labels(task, mode, recipe), checkpoint=checkpoint)]
        peak = self._memory.read_peak()
        if peak > before:
            self._bytes_per_image[mode.name, tasks[0].input_size] = (peak - before) // len(tasks)
        return [
            Segmentation(
                mask=made.mask,
                confidence=made.confidence,
                load_seconds=watch["load"] / len(tasks),
                preprocess_seconds=(watch["preprocess"] + alone["preprocess"]) / len(tasks),
                inference_seconds=(watch["inference"] + alone["inference"]) / len(tasks),
                postprocess_seconds=alone["postprocess"],
                peak_gpu_bytes=peak,
                model=self._describe(model, task),
            )
            for task, made, alone in zip(tasks, labels, own, strict=True)
        ]

    def _predict_all(
        self, task: _Task, model: LoadedModel, watch: Stopwatch, checkpoint: Checkpoint
    ) -> Iterator[tuple[Pass, Prediction]]:
        """Every pass of an image in its order, neighbours of one size together."""
        for _, alike in groupby(task.passes, key=lambda shown: shown.padded):
            while passes := tuple(islice(alike, self.batch_images)):
                predictions = self._predict([(task.image, shown) for shown in passes], model, watch, checkpoint)
                yield from zip(passes, predictions, strict=True)

    def _predict(
        self,
        shown: Sequence[tuple[NDArray[np.uint8], Pass]],
        model: LoadedModel,
        watch: Stopwatch,
        checkpoint: Checkpoint,
    ) -> Sequence[Prediction]:
        """What the model says of passes over images that all have the same size for it."""
        checkpoint()
        with watch.stage("preprocess"):
            pixels = torch.cat([self._show(image, each, model.mode) for image, each in shown])
        checkpoint()
        with watch.stage("inference"):
            return model.predict(pixels)

    def _show(self, image: NDArray[np.uint8], shown: Pass, mode: Mode) -> torch.Tensor:
        area = shown.area
        part = image[area.top : area.top + area.height, area.left : area.left + area.width]
        return to_input(
            part[:, ::-1] if shown.mirrored else part,
            size=shown.size, padded=shown.padded, mean=mode.mean, std=mode.std, device=self.device,
        )  # fmt: skip

    def _fit_memory(self, mode: str, input_size: tuple[int, int]) -> int:
        """How many images of one input size to run together, as far as is known."""
        each = self._bytes_per_image.get((mode, input_size))
        if each is None:
            return self.batch_images
        return min(self.batch_images, max(1, int(MEMORY_SHARE * self._memory.find_free() / each)))

    def _load(self, name: str) -> LoadedModel:
        source, revision = self._sources.get(name, (None, None))
        return load(
            MODES[name],
            source=source,
            revision=revision,
            cache_folder=self._cache_folder,
            offline=self._offline,
            device=self.device,
            dtype=self._dtype,
            compiled=self._compiled,
        )

    def _describe(self, model: LoadedModel, task: _Task) -> ModelInfo:
        return ModelInfo(
            name=model.mode.title,
            revision=model.revision,
            dtype=str(model.dtype).removeprefix("torch."),
            input_size=task.input_size,
            passes=len(task.passes),
            device=self._memory.name,
            label_space=model.mode.label_space,
        )


def _describe_labels(task: _Task, mode: Mode, recipe: Recipe) -> Any:
    """The arguments that `label` and `combine` share."""
    return {
        "size": task.size,
        "channel_offset": mode.channel_offset,
        "confidence": recipe.confidence,
        "unlabeled_below": recipe.unlabeled_below,
    }


def _check(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an image is uint8 (height, width, 3), not {image.dtype} {image.shape}")
    return image


def _mode(name: str) -> Mode:
    if name not in MODES:
        raise ValueError(f"there is no mode {name!r}; the modes are {', '.join(MODES)}")
    return MODES[name]
