"""From files to a network that is ready to run, checked against the mode it is loaded for.

Every way in which files can be wrong (another architecture, other classes, missing tensors, cut short, a pickle with
code in it) raises ModelUnavailable. Where the files come from is the business of weights.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers.utils.logging
from torch import nn
from transformers import SegformerForSemanticSegmentation

from shared.inference import networks, weights
from shared.inference.errors import ModelUnavailable
from shared.inference.mask2former import SemanticMask2Former
from shared.inference.modes import Mode
from shared.inference.postprocess import PixelLogits, QueryLogits


@dataclass(frozen=True)
class LoadedModel:
    """A network on its device in evaluation mode, and what it is."""

    mode: Mode
    network: nn.Module
    run: Callable[[torch.Tensor], networks.Output]
    """The network's own way, compiled or not."""
    revision: str
    dtype: torch.dtype

    @property
    def weight_bytes(self) -> int:
        """What its parameters and buffers take in memory."""
        tensors = [*self.network.parameters(), *self.network.buffers()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def predict(self, pixels: torch.Tensor) -> list[PixelLogits] | list[QueryLogits]:
        """The raw output for each normalised image of a batch, float32 (batch, 3, h, w) on the same device."""
        with torch.inference_mode():
            return networks.split(self.run(pixels))


def load(
    mode: Mode,
    *,
    source: str | None = None,
    revision: str | None = None,
    cache_folder: Path | None = None,
    offline: bool = False,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
) -> LoadedModel:
    """Find the weights of `mode` (see weights.find), read them, check them and move them to `device`.

    With a half `dtype` the large products are computed in it, and what needs the full mantissa in float32 (see
    networks.prepare). If `compiled`, the first run of every shape takes a minute or more (see networks.compile_run).
    Raises ModelUnavailable.
    """
    found = weights.find(mode, source=source, revision=revision, cache_folder=cache_folder, offline=offline)
    try:
        if mode.architecture in ("segformer", "mask2former"):
            network = _read_transformers(mode, found.path)
        else:
            network = _read_deeplab(mode, found.path)
    except (ModelUnavailable, MemoryError):
        raise
    except Exception as error:
        # The readers raise almost anything on a damaged file, and each case means the same to whoever runs this.
        raise weights.unavailable(mode, f"the weights in {found.path} cannot be read: {error}") from error
    network = networks.prepare(network, dtype).to(device)
    run = networks.compile_run(network, dtype, device) if compiled else partial(networks.run, network, dtype=dtype)
    return LoadedModel(mode, network, run, found.revision, dtype)


def _read_transformers(mode: Mode, folder: Path) -> nn.Module:
    config = folder / "config.json"
    if not config.is_file():
        raise weights.unavailable(mode, f"the folder {folder} has no config.json")
    declared = json.loads(config.read_text()).get("model_type")
    if declared != mode.architecture:
        raise weights.unavailable(mode, f"{folder} holds a {declared} model, not {mode.architecture}")
    kind: Any = {
        "segformer": SegformerForSemanticSegmentation,
        "mask2former": SemanticMask2Former,
    }[mode.architecture]
    safe = any(path.suffix == ".safetensors" for path in weights.weight_files(folder))
    with _without_progress_bars():
        # Without safetensors, transformers reads the pickle with weights_only, which builds tensors and nothing else.
        network, report = kind.from_pretrained(
            folder,
            use_safetensors=safe,
            local_files_only=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
        )
    _check_channels(mode, folder, network.config.num_labels)
    _check_complete(mode, folder, sorted(report["missing_keys"]), sorted(map(str, report["mismatched_keys"])))
    return network  # type: ignore[no-any-return]  # transformers has no types


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    # Reading takes a second; a bar per load would only garble the worker's log.
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _read_deeplab(mode: Mode, path: Path) -> nn.Module:
    files = weights.weight_files(path) if path.is_dir() else [path]
    if len(files) != 1:
        raise weights.unavailable(mode, f"{path} holds {len(files)} files of weights, and one is needed")
    tensors = _read_tensors(files[0])
    head = tensors.get("classifier.4.weight")
    if head is None:
        raise weights.unavailable(mode, f"{files[0]} holds no DeepLabV3 (no classifier.4.weight)")
    _check_channels(mode, files[0], head.shape[0])
    network = networks.build_deeplab(mode.architecture, channels=mode.channels)
    used = {name: tensor for name, tensor in tensors.items() if not name.startswith("aux_classifier.")}
    own = network.state_dict()
    missing = sorted(own.keys() - used.keys())
    mismatched = sorted(name for name in own.keys() & used.keys() if own[name].shape != used[name].shape)
    _check_complete(mode, files[0], missing, mismatched)
    network.load_state_dict({name: used[name].to(own[name].dtype) for name in own}, assign=True)
    return network  # type: ignore[no-any-return]  # torchvision has no types


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    tensors: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return tensors


def _check_channels(mode: Mode, path: Path, channels: int) -> None:
    if channels != mode.channels:
        raise weights.unavailable(
            mode, f"{path} tells {channels} classes apart, and the label space {mode.label_space} needs {mode.channels}"
        )


def _check_complete(mode: Mode, path: Path, missing: list[str], mismatched: list[str]) -> None:
    # A library that fills gaps with random numbers would still give masks, only wrong ones.
    for names, what in ((missing, "lacks"), (mismatched, "has other shapes for")):
        if names:
            raise weights.unavailable(mode, f"{path} {what} {len(names)} tensors of {mode.title}, such as {names[0]}")
