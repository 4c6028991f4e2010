"""What is known of the inputs of linear layers: how large each column is, how columns go together.

A layer y = W x loses |(W - Q) x|^2 by codes Q. Its mean over inputs is, for each row d of W - Q,
d H d^T with H = mean of x x^T; the diagonal of H alone, mean of x^2, weights the columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ModelStatistics", "Statistics"]


@dataclass(frozen=True, eq=False)
class Statistics:
    """What is known of the inputs of one linear layer, on the CPU.

    Attributes:
        moments: mean of x^2 of each input column, float64 [in_features], none negative.
        hessian: mean of x x^T, [in_features, in_features], float64, or sums of float64 rounded to
            float32; None if it was not collected.
        count: input rows (tokens) that were seen, at least 1.

    Raises:
        TypeError: for anything but tensors of those dtypes and a whole count.
        ValueError: for other shapes, a moment that is negative, NaN or infinite, a Hessian with NaN
            or infinity, or a count below 1.

    Example:
        >>> known = Statistics.of(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), hessian=True)
        >>> known.moments, known.count
        (tensor([5., 2.], dtype=torch.float64), 2)
        >>> known.hessian
        tensor([[5., 1.],
                [1., 2.]], dtype=torch.float64)
    """

    moments: Tensor
    hessian: Tensor | None = None
    count: int = 1

    def __post_init__(self) -> None:
        if type(self.count) is not int:
            raise TypeError(f"count is {self.count!r:.60}; expected a whole number of rows")
        if self.count < 1:
            raise ValueError(f"count is {self.count}; statistics are of 1 row or more")
        _check_tensor("moments", self.moments, (torch.float64,), 1)
        if not bool((self.moments >= 0).all() & self.moments.isfinite().all()):
            raise ValueError("moments are means of squares: none may be negative, NaN or infinite")
        if self.hessian is not None:
            _check_tensor("hessian", self.hessian, (torch.float64, torch.float32), 2)
            if tuple(self.hessian.shape) != (self.in_features, self.in_features):
                raise ValueError(
                    f"the Hessian has shape {tuple(self.hessian.shape)} beside moments of "
                    f"{self.in_features} columns; expected [in_features, in_features]"
                )
            if not bool(self.hessian.isfinite().all()):
                raise ValueError("the Hessian holds a NaN or infinity")

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.moments.shape[0]

    @classmethod
    def of(cls, inputs: Tensor, *, hessian: bool = False) -> Statistics:
        """Those of some inputs, [..., in_features], of any float dtype; sums are float64."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).double().cpu()
        moments = rows.square().mean(0)
        return cls(moments, rows.T @ rows / len(rows) if hessian else None, len(rows))

    def merged(self, other: Statistics) -> Statistics:
        """Those of the inputs of both together.

        Raises:
            ValueError: for another number of columns, or if only one of them has a Hessian.

        Example:
            >>> one, two = torch.full((4, 3), 1.0), torch.full((6, 3), 2.0)
            >>> Statistics.of(one).merged(Statistics.of(two)).moments[0].item()
            2.8
        """
        if self.in_features != other.in_features:
            raise ValueError(
                f"statistics of {self.in_features} and of {other.in_features} columns are of "
                "different layers"
            )
        if (self.hessian is None) != (other.hessian is None):
            raise ValueError(
                "only one of the statistics has a Hessian; without_hessian() makes of it one that "
                "can be merged"
            )
        count = self.count + other.count
        hessian = None
        if self.hessian is not None and other.hessian is not None:
            sums = self.hessian.double() * self.count + other.hessian.double() * other.count
            dtype = torch.promote_types(self.hessian.dtype, other.hessian.dtype)
            hessian = (sums / count).to(dtype)
        moments = (self.moments * self.count + other.moments * other.count) / count
        return Statistics(moments, hessian, count)

    def without_hessian(self) -> Statistics:
        """The moments alone."""
        return self if self.hessian is None else Statistics(self.moments, None, self.count)

    def __repr__(self) -> str:
        hessian = "" if self.hessian is None else ", Hessian"
        return f"Statistics({self.in_features} columns, {self.count} rows{hessian})"


class ModelStatistics(Mapping[str, Statistics]):
    """Statistics of a model's linear layers by dotted name; nothing in it changes.

    Layers that share their inputs (q, k and v; gate and up) share one object.

    Args:
        layers: statistics by name, or functions that read them when they are asked for.
        unseen: names of layers that no input reached, such as experts that no token chose.
        source: what the inputs were, in words.

    Example:
        >>> known = ModelStatistics({"0": Statistics.of(torch.ones(2, 3))}, unseen=["1"])
        >>> list(known), known["0"].count, known.get("1")
        (['0'], 2, None)
        >>> known["1"]
        Traceback (most recent call last):
            ...
        KeyError: '1: no input reached this layer while the model was calibrated'
    """

    def __init__(
        self,
        layers: Mapping[str, Statistics | Callable[[], Statistics]],
        *,
        unseen: tuple[str, ...] | list[str] = (),
        source: str = "",
    ) -> None:
        for name, known in layers.items():
            if not isinstance(known, Statistics) and not callable(known):
                raise TypeError(f"{name} has a {type(known).__name__}; expected Statistics")
        self._layers = dict(layers)
        self.unseen = tuple(name for name in unseen if name not in self._layers)
        self.source = source

    def __getitem__(self, name: str) -> Statistics:
        if name in self.unseen:
            raise KeyError(f"{name}: no input reached this layer while the model was calibrated")
        known = self._layers[name]
        return known if isinstance(known, Statistics) else known()

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def shares(self) -> dict[str, str]:
        """By name: the first layer that has the same statistics, so the same inputs.

        Example:
            >>> one = Statistics.of(torch.ones(2, 3))
            >>> ModelStatistics({"q": one, "k": one}).shares
            {'q': 'q', 'k': 'q'}
        """
        firsts: dict[int, str] = {}
        return {name: firsts.setdefault(id(known), name) for name, known in self._layers.items()}

    def merged(self, other: ModelStatistics) -> ModelStatistics:
        """Those of both runs together; a layer that one of them did not reach is the other's.

        Raises:
            ValueError: as :meth:`Statistics.merged` says, with the layer's name.
        """
        done: dict[tuple[int, int], Statistics] = {}
        mine, theirs = dict(self), dict(other)
        layers = {**mine, **theirs}
        for name in mine.keys() & theirs.keys():
            pair = id(mine[name]), id(theirs[name])
            try:
                layers[name] = done[pair] = done.get(pair) or mine[name].merged(theirs[name])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        sources = dict.fromkeys(filter(None, (self.source, other.source)))
        unseen = dict.fromkeys([*self.unseen, *other.unseen])
        return ModelStatistics(layers, unseen=[*unseen], source="; ".join(sources))

    def without_hessians(self) -> ModelStatistics:
        """The moments alone."""
        full = dict(self)
        done = {id(known): known.without_hessian() for known in full.values()}
        layers = {name: done[id(known)] for name, known in full.items()}
        return ModelStatistics(layers, unseen=self.unseen, source=self.source)

    def __repr__(self) -> str:
        unseen = f", {len(self.unseen)} unseen" if self.unseen else ""
        source = f": {self.source}" if self.source else ""
        return f"ModelStatistics({len(self)} layers{unseen}{source})"


def _check_tensor(name: str, value: object, dtypes: tuple[torch.dtype, ...], ndim: int) -> None:
    allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a tensor of {allowed}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} is {value.dtype}; expected {allowed}")
    if value.ndim != ndim or value.device.type != "cpu":
        raise ValueError(
            f"{name} has shape {tuple(value.shape)} on {value.device}; expected {ndim} "
            f"dimension{'s' * (ndim > 1)} on the CPU"
        )
