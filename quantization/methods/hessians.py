"""Methods that see how columns go together: a Hessian, made safe, and the kernels that use it."""

from __future__ import annotations

import warnings

import numpy as np
import torch

from quantization.methods.fitting import Problem, Stored
from quantization.methods.statistics import Statistics
from quantization.ops import native
from quantization.ops.native import Levels, Tensor
from quantization.schemes.packed_weights import PackedWeights
from quantization.schemes.scheme import Scheme

__all__ = ["CoupledProblem"]

_MORE = 10.0  # times the damping, where a factorisation fails


class CoupledProblem(Problem):
    """A problem whose loss is ``sum of d H d^T`` over rows, d the error of a row.

    H is the mean of x x^T, divided by the mean of its diagonal and damped: ``H + damping * I``.

    Args:
        weight, scheme: as for :class:`Problem`.
        statistics: with a Hessian.
        damping: what is added to the diagonal, in units of its mean.
        user: the method that asks, for errors.

    Raises:
        ValueError: without a Hessian, or for a damping that is not above 0.
    """

    def __init__(
        self,
        weight: Tensor,
        scheme: Scheme,
        statistics: Statistics | None,
        damping: float,
        user: str,
    ) -> None:
        if statistics is None or statistics.hessian is None:
            raise ValueError(
                f"the method {user} needs the Hessian of the layer's inputs: "
                "calibrate(model, statistics='hessian') gives it; lsq does without"
            )
        if not damping > 0:
            raise ValueError(f"damping must be above 0, not {damping!r}")
        super().__init__(weight, scheme, statistics)
        hessian = statistics.hessian.double()
        mean = hessian.diagonal().mean()
        self._plain = hessian / mean if mean > 0 else torch.eye(len(hessian)).double()
        self._damping = damping
        self._rows = self.matrix.x.shape[0]

    def _damped(self, damping: float) -> torch.Tensor:
        return self._plain + damping * torch.eye(len(self._plain), dtype=torch.float64)

    def factor(self, order: torch.Tensor) -> torch.Tensor:
        """Upper U with ``H^-1 = U^T U`` for columns in that order, float64.

        With H = R R^T, R upper, U is the inverse of R: a factorisation from the end, and one
        triangular solve. A matrix that is not positive definite is damped further, with a warning.
        """
        while True:
            backwards = order.flip(0)
            lower, failed = torch.linalg.cholesky_ex(
                self._damped(self._damping)[backwards][:, backwards]
            )
            if not failed:
                break
            warnings.warn(
                f"the Hessian is not positive definite under a damping of {self._damping:g} of its "
                f"mean diagonal; {self._damping * _MORE:g} is taken",
                stacklevel=2,
            )
            self._damping *= _MORE
        eye = torch.eye(len(order), dtype=torch.float64)
        factor: torch.Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
        return factor

    # ---- the kernels' arrays ---------------------------------------------------------------

    def _levels(self) -> Levels:
        return Levels(self.codes, self.table)

    def _each_row(self, numbers: np.ndarray) -> np.ndarray:
        """A float32 array of rows of its own; what the whole matrix has one of is repeated."""
        return np.array(np.broadcast_to(numbers, (self._rows, numbers.shape[1])), "float32")

    def _opened(self, stored: Stored) -> tuple[np.ndarray, np.ndarray | None]:
        """Scales and zeros, as arrays that may be written to."""
        zeros = None if stored.zeros is None else self._each_row(stored.zeros)
        return self._each_row(self.near(stored.scales.restored)), zeros

    def round_in_order(self, stored: Stored) -> np.ndarray:
        """Levels, float32 ``[out, in]``: columns of large inputs first, the others make up."""
        order = self._plain.diagonal().argsort(descending=True, stable=True)
        places = (order // self.matrix.group).int().numpy()
        x = self._each_row(self.near_rows)[:, order.numpy()]
        values = native.round_in_order(
            np.ascontiguousarray(x),
            self.factor(order).float().contiguous().numpy(),
            places if not self.matrix.is_one_block else places * 0,
            *self._opened(stored),
            self._levels(),
        )
        back = np.empty_like(values)
        back[:, order.numpy()] = values
        return back

    def descend(self, stored: Stored, values: np.ndarray, sweeps: int) -> tuple[Stored, np.ndarray]:
        """Scales, zeros and levels of less loss, by descent. ``values`` is used up."""
        scheme, x = self.scheme, self.near_rows
        hessian = self._damped(self._damping).float()
        scales, zeros = self._opened(stored)
        off = torch.from_numpy(x - self._decoded(values, scales, zeros))
        slopes = (off @ hessian).numpy()
        moves = scheme.grid != "mxfp4" and not self.matrix.is_one_block
        find = self.find(native.BOTH)
        steps = stored.scales.steps
        native.descend(
            values,
            slopes,
            scales,
            zeros,
            hessian.numpy(),
            None if steps is None else self.near(_floats(steps)[:, None])[:, 0],
            self.matrix.group,
            self._levels(),
            find,
            (scheme.scale_dtype or self.matrix.source.name, self._zero_dtype()),
            sweeps,
            moves,
        )
        if not moves:
            return stored, values
        own = None if steps is None else _floats(steps)
        return self.store(self.far(scales), zeros, own), values

    def _zero_dtype(self) -> str:
        return self.matrix.source.name if self.scheme.zero_point == "float" else "float32"

    def _decoded(
        self, values: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None
    ) -> np.ndarray:
        every = slice(None)
        if zeros is not None:
            values = values - self.matrix.per_weight(zeros, every)
        decoded: np.ndarray = values * self.matrix.per_weight(scales, every)
        return decoded

    def pack_values(self, stored: Stored, values: np.ndarray) -> PackedWeights:
        """The matrix of levels that are chosen already."""
        if self.codebook is None:
            dtype = "uint8" if stored.zeros is not None else "int8"
            codes = values.astype(dtype)
        else:
            dtype, codes = "uint8", np.empty(values.shape, "uint8")
            for row in range(len(values)):
                levels = self.codebook[row if len(self.codebook) > 1 else 0]
                order = levels.argsort(kind="stable")
                codes[row] = order[np.searchsorted(levels[order], values[row])]
        return self.pack(stored, native.as_tensor_like(codes, dtype, self.matrix.weight))


def _floats(steps: Tensor) -> np.ndarray:
    return native.to_array(native.cast(steps, "float32"))
