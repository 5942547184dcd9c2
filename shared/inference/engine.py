"""The engine: one image in, its mask and the time each stage took out. It keeps the models it has loaded warm.

One engine belongs to one thread; it runs one image at a time. Files are read by media and written by masks.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from shared.inference.device import choose_device, describe_device
from shared.inference.errors import OutOfMemory
from shared.inference.loading import LoadedModel, load
from shared.inference.modes import MODES, Mode
from shared.inference.postprocess import label, proceed
from shared.inference.recipe import DEFAULT, Recipe
from shared.inference.resize import fit_size, to_input

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ModelInfo:
    """Exactly what made a mask: `input_size` is (width, height), `revision` the hub's commit or a digest of files."""

    name: str
    revision: str
    dtype: str
    input_size: tuple[int, int]
    device: str
    label_space: str


@dataclass(frozen=True)
class Segmentation:
    """A mask, uint8 (height, width) of class ids at the image's own size, and what it cost.

    `load_seconds` is 0 when the model was warm; `peak_gpu_bytes` is 0 on a CPU.
    """

    mask: NDArray[np.uint8]
    load_seconds: float
    preprocess_seconds: float
    inference_seconds: float
    postprocess_seconds: float
    peak_gpu_bytes: int
    model: ModelInfo


class Engine:
    """Models on one device.

    `sources` maps a mode to the (folder or hub repository, revision) that takes the place of its own; `dtype` is
    float32, float16 or bfloat16, by default float16 on CUDA and float32 elsewhere. Raises ValueError for a device or
    dtype that is not there.
    """

    def __init__(
        self,
        *,
        device: str = "auto",
        dtype: str | None = None,
        sources: Mapping[str, tuple[str, str | None]] | None = None,
        cache_folder: Path | None = None,
        offline: bool = False,
    ) -> None:
        self.device = choose_device(device)
        chosen = dtype or ("float16" if self.device.type == "cuda" else "float32")
        if chosen not in _DTYPES:
            raise ValueError(f"dtype {chosen!r} is none of {', '.join(_DTYPES)}")
        self._dtype = _DTYPES[chosen]
        self._sources = dict(sources or {})
        self._cache_folder = cache_folder
        self._offline = offline
        self._models: dict[str, LoadedModel] = {}
        self._device_name, _ = describe_device(self.device)

    @property
    def loaded(self) -> tuple[str, ...]:
        """The modes whose models are in memory, in the order they were loaded."""
        return tuple(self._models)

    def warm_up(self, mode: str) -> None:
        """Load a mode and run it once, so that the first image does not pay for either. Raises as `segment` does."""
        side = _mode(mode).input_size
        self.segment(np.full((side, side, 3), 127, dtype=np.uint8), mode)

    @property
    def batch_images(self) -> int:
        """The most images that are worth giving to `segment_batch` together."""
        return 1

    def input_size(self, width: int, height: int, mode: str, recipe: Recipe = DEFAULT) -> tuple[int, int] | None:
        """The (width, height) that an image of this size has for the model; None if it takes several passes.

        Images for which it is the same go through the model together.
        """
        return fit_size(width, height, recipe.input_size or _mode(mode).input_size)

    def segment_batch(
        self,
        images: Sequence[NDArray[np.uint8]],
        mode: str,
        recipe: Recipe = DEFAULT,
        *,
        checkpoint: Callable[[], None] = proceed,
    ) -> list[Segmentation]:
        """As `segment`, of several images whose `input_size` is the same."""
        return [self.segment(image, mode, recipe, checkpoint=checkpoint) for image in images]

    def segment(
        self,
        image: NDArray[np.uint8],
        mode: str,
        recipe: Recipe = DEFAULT,
        *,
        checkpoint: Callable[[], None] = proceed,
    ) -> Segmentation:
        """Label every pixel of uint8 RGB (height, width, 3) with a class id of the mode's label space.

        `checkpoint` is called between the stages and may raise to stop; what it raises passes through. Raises
        ModelUnavailable, OutOfMemory, and ValueError for an unknown mode or an array of another kind.
        """
        chosen = _mode(mode)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"an image is uint8 (height, width, 3), not {image.dtype} {image.shape}")
        height, width = image.shape[:2]
        size = fit_size(width, height, recipe.input_size or chosen.input_size)
        seconds: dict[str, float] = {}
        with self._watch_memory(f"{width}×{height} in mode {mode} at {size[0]}×{size[1]}"):
            with self._stage("load", seconds, checkpoint):
                model = self._model(chosen)
            with self._stage("preprocess", seconds, checkpoint):
                pixels = to_input(image, size=size, mean=chosen.mean, std=chosen.std, device=self.device)
            with self._stage("inference", seconds, checkpoint):
                [prediction] = model.predict(pixels)
            with self._stage("postprocess", seconds, checkpoint):
                labels = label(
                    prediction, size=(width, height), channel_offset=chosen.channel_offset, checkpoint=checkpoint
                )
        return Segmentation(
            mask=labels.mask,
            load_seconds=seconds["load"],
            preprocess_seconds=seconds["preprocess"],
            inference_seconds=seconds["inference"],
            postprocess_seconds=seconds["postprocess"],
            peak_gpu_bytes=torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0,
            model=self._describe(model, size),
        )

    def _model(self, mode: Mode) -> LoadedModel:
        if mode.name not in self._models:
            source, revision = self._sources.get(mode.name, (None, None))
            self._models[mode.name] = load(
                mode,
                source=source,
                revision=revision,
                cache_folder=self._cache_folder,
                offline=self._offline,
                device=self.device,
                dtype=self._dtype,
            )
        return self._models[mode.name]

    def _describe(self, model: LoadedModel, size: tuple[int, int]) -> ModelInfo:
        return ModelInfo(
            name=model.mode.title,
            revision=model.revision,
            dtype=str(model.dtype).removeprefix("torch."),
            input_size=size,
            device=self._device_name,
            label_space=model.mode.label_space,
        )

    @contextmanager
    def _stage(self, name: str, seconds: dict[str, float], checkpoint: Callable[[], None]) -> Iterator[None]:
        checkpoint()
        started = self._now()
        yield
        seconds[name] = self._now() - started

    def _now(self) -> float:
        # CUDA only queues work; without waiting for it, a stage would be charged for the one before it.
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def _watch_memory(self, task: str) -> Iterator[None]:
        """Measure the peak from here on, and turn an allocator's failure into OutOfMemory, its memory given back."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not _ran_out(error):
                raise
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            raise OutOfMemory(
                f"{self._device_name} has too little memory for {task}; choose a smaller input_size"
            ) from error


def _ran_out(error: Exception) -> bool:
    # The CPU allocator raises a bare RuntimeError; its words are all there is to go by.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _mode(name: str) -> Mode:
    if name not in MODES:
        raise ValueError(f"there is no mode {name!r}; the modes are {', '.join(MODES)}")
    return MODES[name]
