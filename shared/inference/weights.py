"""Where the weights of a mode lie, and getting them there: the hub, torchvision's server, or a local folder.

Only files are handled here; loading turns them into a network. Whatever cannot be had raises ModelUnavailable with
the file, host or repository that is missing and what to do about it.
"""

import functools
import hashlib
import os
import tempfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.utils
import torch.hub
import torchvision
from huggingface_hub.utils.tqdm import tqdm

from shared.inference.errors import ModelUnavailable
from shared.inference.modes import Mode

CONNECT_SECONDS = 10.0
"""How long a silent server is waited for: without a network, a job must fail at once and not after minutes."""

_SAFE_FILES = ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors")
# Some older repositories publish nothing else. These are read by the restricted unpickler, which builds tensors only.
_PICKLED_FILES = ("pytorch_model.bin", "*.pth")


@dataclass(frozen=True)
class Weights:
    """A folder with the files of a model, or one file, and the revision that tells exactly which weights these are.

    The revision is the hub's commit, or `sha256:` and twelve digits of the digest of the local files.
    """

    path: Path
    revision: str


def unavailable(mode: Mode, reason: str) -> ModelUnavailable:
    """The error for `mode`, with the two ways out."""
    return ModelUnavailable(
        f"The model of mode {mode.name} is not available: {reason}. Where there is a network, run: "
        f"maskline models pull {mode.name}; otherwise set "
        f"MASKLINE_MODELS__{mode.name.upper()}__SOURCE to a local folder"
    )


def find(
    mode: Mode,
    *,
    source: str | None = None,
    revision: str | None = None,
    cache_folder: Path | None = None,
    offline: bool = False,
) -> Weights:
    """The weights of a mode, downloaded now if they are not here yet and `offline` (or HF_HUB_OFFLINE) allows.

    `source` is a local folder or a hub repository that takes the place of the mode's own. Weights already in the
    cache are used without asking whether the hub has newer ones; `pull` asks. Raises ModelUnavailable.
    """
    return _find(mode, source, revision, cache_folder, may_download=not (offline or _hub_is_offline()), newest=False)


def pull(
    mode: Mode,
    *,
    source: str | None = None,
    revision: str | None = None,
    cache_folder: Path | None = None,
    tqdm_class: type | None = None,
) -> Weights:
    """Download what a mode needs, with progress bars made by `tqdm_class`; complete files are not fetched again."""
    return _find(mode, source, revision, cache_folder, may_download=True, newest=True, tqdm_class=tqdm_class)


def is_present(
    mode: Mode, *, source: str | None = None, revision: str | None = None, cache_folder: Path | None = None
) -> bool:
    """Whether the files of a mode are on this machine; whether they can be read is for loading to say."""
    try:
        _find(mode, source, revision, cache_folder, may_download=False, newest=False)
    except ModelUnavailable:
        return False
    return True


def _find(
    mode: Mode,
    source: str | None,
    revision: str | None,
    cache_folder: Path | None,
    *,
    may_download: bool,
    newest: bool,
    tqdm_class: type | None = None,
) -> Weights:
    bars = tqdm_class or tqdm
    if source is None and mode.origin == "packaged":
        return _in_folder(mode, Path(__file__).parent / mode.source)
    if source is None and mode.origin == "torchvision":
        return _from_torchvision(mode, cache_folder, may_download, bars)
    repository = source or mode.source
    folder = Path(repository).expanduser()
    if folder.is_dir():
        return _in_folder(mode, folder)
    if not _is_repository(repository):
        raise unavailable(mode, f"there is no folder {repository}")
    wanted = revision or (mode.revision if source is None else None) or "main"
    cache = None if cache_folder is None else cache_folder / "huggingface"
    return _from_hub(mode, repository, wanted, cache, may_download=may_download, newest=newest, bars=bars)


def _is_repository(name: str) -> bool:
    try:
        huggingface_hub.utils.validate_repo_id(name)  # type: ignore[attr-defined]  # exported in its own way
    except huggingface_hub.errors.HFValidationError:
        return False
    return "/" in name


def weight_files(folder: Path) -> list[Path]:
    """The files of `folder` that hold tensors: safetensors if there are any, else pickled ones."""
    for patterns in (_SAFE_FILES, _PICKLED_FILES):
        files = sorted(path for pattern in patterns for path in folder.glob(pattern) if path.suffix != ".json")
        if files:
            return files
    return []


def _in_folder(mode: Mode, folder: Path) -> Weights:
    files = weight_files(folder)
    if not files:
        raise unavailable(mode, f"the folder {folder} has no {_SAFE_FILES[0]}")
    config = folder / "config.json"
    return Weights(folder, _digest([config, *files] if config.is_file() else files))


def _digest(files: list[Path]) -> str:
    # Size and time are part of the cache's key, so a file exchanged under a running worker is read anew.
    stamps = ((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    return _digest_of(tuple(stamps))


@functools.lru_cache(maxsize=16)
def _digest_of(stamps: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, _, _ in stamps:
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return f"sha256:{digest.hexdigest()[:12]}"


def _hub_is_offline() -> bool:
    return bool(huggingface_hub.constants.HF_HUB_OFFLINE)


def _from_hub(
    mode: Mode, repository: str, revision: str, cache: Path | None, *, may_download: bool, newest: bool, bars: type
) -> Weights:
    if not newest or not may_download:
        cached = _in_hub_cache(repository, revision, cache)
        if cached is not None:
            return cached
    if not may_download:
        raise unavailable(mode, f"{repository} ({revision}) is not in the local cache, and downloads are off")
    host = huggingface_hub.constants.ENDPOINT
    try:
        api = huggingface_hub.HfApi()
        described = api.model_info(repository, revision=revision, timeout=CONNECT_SECONDS)
        names = [file.rfilename for file in described.siblings or ()]
        patterns = _SAFE_FILES if any(name.endswith(".safetensors") for name in names) else _PICKLED_FILES
        folder = huggingface_hub.snapshot_download(
            repository,
            revision=revision,
            cache_dir=cache,
            allow_patterns=["config.json", *patterns],
            etag_timeout=CONNECT_SECONDS,
            tqdm_class=bars,
        )
    except Exception as error:
        # Whatever the hub's client raises (no network, no such repository, a full disk), the weights are not here.
        raise unavailable(
            mode, f"{repository} ({revision}) could not be fetched from {host}: {_first_line(error)}"
        ) from error
    if not weight_files(Path(folder)):
        raise unavailable(mode, f"{repository} ({revision}) on {host} has no {_SAFE_FILES[0]}")
    return Weights(Path(folder), Path(folder).name)


def _in_hub_cache(repository: str, revision: str, cache: Path | None) -> Weights | None:
    try:
        folder = huggingface_hub.snapshot_download(
            repository, revision=revision, cache_dir=cache, allow_patterns=["config.json"], local_files_only=True
        )
    except huggingface_hub.errors.LocalEntryNotFoundError:
        return None
    # Another program may have cached the configuration alone.
    return Weights(Path(folder), Path(folder).name) if weight_files(Path(folder)) else None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def torchvision_url(mode: Mode) -> str:
    """The address of the weights a torchvision mode names as `Enumeration.MEMBER`."""
    weights: Any = torchvision.models.get_weight(mode.source)
    return str(weights.url)


def _from_torchvision(mode: Mode, cache_folder: Path | None, may_download: bool, bars: type) -> Weights:
    url = torchvision_url(mode)
    folder = Path(torch.hub.get_dir()) / "checkpoints" if cache_folder is None else cache_folder / "torchvision"
    path = folder / url.rsplit("/", 1)[1]
    if not path.is_file():
        if not may_download:
            raise unavailable(mode, f"{path} does not exist, and downloads are off")
        try:
            _download(url, path, bars)
        except (OSError, ValueError) as error:
            raise unavailable(mode, f"{url} could not be fetched: {_first_line(error)}") from error
    return Weights(path, _digest([path]))


def _download(url: str, path: Path, bars: type) -> None:
    """Fetch a file whose name ends in the first digits of its SHA-256, as torchvision's do; ValueError if they differ.

    Instead of torch.hub's own function, which waits for ever for a silent server.
    """
    expected = path.stem.rsplit("-", 1)[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    request = urllib.request.Request(url, headers={"User-Agent": "maskline"})  # noqa: S310  # from torchvision's table
    with urllib.request.urlopen(request, timeout=CONNECT_SECONDS) as response:  # noqa: S310
        total = int(response.headers.get("Content-Length", 0)) or None
        # Written beside its place and moved there, so no reader ever meets half a file.
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as part:
            try:
                with bars(total=total, unit="B", unit_scale=True, desc=path.name) as bar:
                    while block := response.read(2**20):
                        part.write(block)
                        digest.update(block)
                        bar.update(len(block))
                part.close()
                if not digest.hexdigest().startswith(expected):
                    raise ValueError(f"the file's SHA-256 does not begin with {expected}")
                os.replace(part.name, path)
            except BaseException:
                os.unlink(part.name)
                raise
