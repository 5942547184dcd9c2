"""The inference core in this process: made of a worker's settings, for the commands that need no service."""

import importlib.util
from typing import TYPE_CHECKING, Any

from cli.failures import Failure, Misuse
from shared.inference.recipe import Recipe

if TYPE_CHECKING:
    from shared.inference.engine import Engine
    from shared.inference.modes import Mode


def require_core() -> None:
    """Failure unless the packages that read images and make masks are installed."""
    if any(importlib.util.find_spec(name) is None for name in ("numpy", "PIL", "torch", "transformers")):
        raise Failure("masks need the worker's packages, which are not installed here: pip install 'maskline[worker]'")


def choose_mode(name: str) -> "Mode":
    from shared.inference.modes import MODES

    if name not in MODES:
        raise Misuse(f"there is no mode {name}; the modes are {', '.join(MODES)}")
    return MODES[name]


def choose_recipe(**wanted: Any) -> Recipe:
    """The recipe of these fields. Misuse for what does not go together."""
    try:
        return Recipe(**wanted)
    except ValueError as error:
        raise Misuse(str(error)) from error


def open_engine() -> "Engine":
    """No model is loaded yet."""
    from cli.access import load_service_settings
    from shared.inference.engine import Engine

    try:
        return Engine(**load_service_settings().describe_engine())
    except ValueError as error:
        raise Failure(f"MASKLINE_WORKER__… does not fit this machine: {error}") from error


def load_pixel_limit() -> int:
    """How large an image a worker would take."""
    from cli.access import load_service_settings

    return load_service_settings().worker.image_pixels
