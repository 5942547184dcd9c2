"""The models that are in memory, within a budget: whichever was used longest ago makes room."""

from collections import OrderedDict
from collections.abc import Callable

from shared.inference.loading import LoadedModel


class Shelf:
    """Models by mode. `load` brings one in; `budget_bytes` bounds their weights, though one may always stay."""

    def __init__(self, load: Callable[[str], LoadedModel], *, budget_bytes: int) -> None:
        self._load = load
        self._budget_bytes = budget_bytes
        self._models: OrderedDict[str, LoadedModel] = OrderedDict()

    @property
    def modes(self) -> tuple[str, ...]:
        """What is there, the one used last at the end."""
        return tuple(self._models)

    def take(self, mode: str) -> LoadedModel:
        """The model of a mode, loaded now if it is not there. Raises what `load` raises."""
        if mode not in self._models:
            self._models[mode] = self._load(mode)
        self._models.move_to_end(mode)
        while len(self._models) > 1 and sum(model.weight_bytes for model in self._models.values()) > self._budget_bytes:
            self._models.popitem(last=False)
        return self._models[mode]

    def keep_only(self, mode: str) -> None:
        """Drop every other model."""
        for other in [name for name in self._models if name != mode]:
            del self._models[other]
