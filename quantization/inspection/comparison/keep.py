"""Which layers to leave in float, so that a model is near enough to its reference: by trying."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from quantization.calibration.calls import observed, recorded
from quantization.calibration.evaluate import Divergence, divergence
from quantization.calibration.plans import loss_of
from quantization.console.progress import Progress, telling
from quantization.models.recipe import Recipe
from quantization.swap.patterns import exact_pattern
from quantization.swap.walker import walk

__all__ = ["Kept", "kept"]

_RETURNS = 12  # trials of giving layers back


class Kept(dict[str, None]):
    """Rules ``{layer: None}`` for a recipe, and what the model loses with them.

    Attributes:
        layers: dotted names of the layers that stay in float.
        measured: the divergence with these layers in float, as it was measured.
        trials: lists that were measured for it.

    Example:
        >>> Kept({"head": None}).before("w4"), Kept({"a": None}).before({"a": "w2", "*": "w8"})
        ({'head': None, '*': 'w4'}, {'a': None, '*': 'w8'})
    """

    layers: tuple[str, ...] = ()
    measured: Divergence | None = None
    trials: int = 0

    def before(self, recipe: Recipe) -> dict[Any, Any]:
        """The rules of a recipe, a scheme or several, after these, which count first."""
        rules = recipe if isinstance(recipe, Mapping) else {"*": recipe}
        return {**self, **{pattern: rule for pattern, rule in rules.items() if pattern not in self}}


def kept(
    model: nn.Module,
    reference: nn.Module,
    ranked: Sequence[str],
    batches: Sequence[Any],
    most: float,
    show: Progress | bool | None = None,
    measured: bool = False,
) -> Kept:
    """A short list of layers with which the model keeps to a divergence.

    Args:
        model: its layers are swapped for those of the reference, and come back.
        reference: has layers of the same names.
        ranked: names to choose from, what is thought worst first.
        batches: to measure on.
        most: KL a token, or drift.
        show: True for a bar, or a function that is called with (done, total) trials.
        measured: rank them anew, by what each loses where all others are in float.

    Raises:
        ValueError: if all of them do not do.
    """
    with telling(show, "measuring lists") as told, observed(model, reference):
        trial = _Trials(model, reference, batches, most, told, ranked)
        if measured:
            trial.rank()
        return _rules(model, trial, trial.shortest())


class _Trials:
    """Lists of layers, measured."""

    def __init__(
        self, model: nn.Module, reference: nn.Module, batches: Sequence[Any], most: float,
        told: Progress, ranked: Sequence[str],
    ) -> None:  # fmt: skip
        self._model, self._reference, self._batches = model, reference, batches
        self._rounds = recorded(reference)
        self._most, self._told, self._ranked = most, told, list(ranked)
        self.found: dict[tuple[str, ...], Divergence] = {}
        self._expected = len(ranked).bit_length() + 2 + _RETURNS

    def rank(self) -> None:
        """Order the layers by what each alone loses, the worst first."""
        names = self._ranked
        self._expected += len(names)
        alone = {name: self.loss([n for n in names if n != name]) for name in names}
        self._ranked = sorted(names, key=lambda name: -alone[name])

    def does(self, names: Sequence[str]) -> bool:
        """Whether the model keeps to the divergence with these layers in float."""
        return self.loss(names) <= self._most

    def loss(self, names: Sequence[str]) -> float:
        """The divergence with these layers in float."""
        key = tuple(names)
        if key not in self.found:
            with in_float(self._model, self._reference, key):
                self.found[key] = divergence(
                    self._model, self._rounds(), self._batches, progress=False
                )
            self._told(min(len(self.found), self._expected), self._expected)
        return loss_of(self.found[key])[1]

    def shortest(self) -> list[str]:
        """The shortest head of the ranking that does, without what it does not need."""
        low, high = 0, len(self._ranked)
        if not self.does(self._ranked):
            raise ValueError(
                f"max_divergence is {self._most:.5g}, and with all {high} layers in float the "
                f"model still loses {self.loss(self._ranked):.5g}: raise it"
            )
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.does(self._ranked[:middle]) else (middle + 1, high)
        return self._without_spare(self._ranked[:high])

    def _without_spare(self, names: list[str]) -> list[str]:
        """Give back what is thought least of, many at once and then fewer, while that does."""
        size, tries = len(names) // 2, 0
        while size and tries < _RETURNS:
            place = len(names) - size
            while place >= 0 and tries < _RETURNS:
                fewer = names[:place] + names[place + size :]
                tries += 1
                names = fewer if self.does(fewer) else names
                place = min(place, len(names)) - size
            size //= 2
        return names


@contextmanager
def in_float(model: nn.Module, reference: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """A model with some modules of another in their places, under all their names.

    Example:
        >>> model, other = nn.Sequential(nn.ReLU()), nn.Sequential(nn.GELU())
        >>> with in_float(model, other, ["0"]):
        ...     print(model[0])
        GELU(approximate='none')
        >>> model[0]
        ReLU()
    """
    new = {id(model.get_submodule(name)): reference.get_submodule(name) for name in names}
    sites = [site for site in walk(model) if site.parent is not None and id(site.module) in new]
    try:
        for site in sites:
            assert site.parent is not None
            site.parent._modules[site.key] = new[id(site.module)]
        yield
    finally:
        for site in sites:
            assert site.parent is not None
            site.parent._modules[site.key] = site.module


def _rules(model: nn.Module, trial: _Trials, names: list[str]) -> Kept:
    made = Kept({exact_pattern(model, name): None for name in names})
    made.layers = tuple(names)
    trial.loss(names)
    made.measured, made.trials = trial.found[tuple(names)], len(trial.found)
    return made
