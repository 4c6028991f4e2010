"""Methods by name: how a weight matrix becomes codes under a scheme.

=============  ====================================================================  ============
method         what it makes least                                                   needs
=============  ====================================================================  ============
``rtn``        nothing: scales from the range, codes rounded to nearest              -
``lsq``        squared error, over scales and zero points                            -, moments
``hqq``        errors to the power 0.7, over zero points                             -
``sinq``       imbalance of rows and columns; needs multipliers (``+cols``)          -
``sinq_lsq``   squared error of what ``sinq`` gives, over scales and zero points     -, moments
``awq``        squared error, over powers of the inputs' size; needs ``+cols``       moments
``gptq``       error of the outputs, over codes column by column                     Hessian
``descent``    the same, over all codes, scales and zero points, by turns            Hessian
=============  ====================================================================  ============

A method is a function ``(weight, scheme, statistics) -> PackedWeights``: ``weight`` ``[out, in]``
is finite and only read, ``statistics`` are those of the layer's inputs, or None.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from quantization.console.near import did_you_mean
from quantization.methods.columns import awq, sinq, sinq_lsq
from quantization.methods.gptq import descent, gptq
from quantization.methods.hqq import hqq
from quantization.methods.lsq import lsq
from quantization.methods.statistics import Statistics
from quantization.ops import native
from quantization.ops.dtypes import name_of
from quantization.ops.native import Tensor
from quantization.schemes.grids import WEIGHED
from quantization.schemes.packed_weights import PARTS, PackedWeights, pack_matrix
from quantization.schemes.scheme import Scheme, scheme_of

__all__ = ["Method", "fit_matrix", "method_name", "method_names", "method_of", "register_method"]

#: ``(weight, scheme, statistics) -> PackedWeights``.
Method = Callable[[Any, Scheme, Statistics | None], PackedWeights]


def rtn(weight: Tensor, scheme: Scheme, statistics: Statistics | None = None) -> PackedWeights:
    """Rounding to nearest under scales of the range; moments weigh grids that choose by error.

    Source: :func:`quantization.pack_matrix`, which says what each grid does.

    Example:
        >>> import torch
        >>> rtn(torch.tensor([[-7.5, 7.0]]), Scheme.parse("w4")).scales
        tensor([[1.]])
    """
    if statistics is None or scheme.grid not in WEIGHED:
        return pack_matrix(weight, scheme)
    return pack_matrix(weight, scheme, importance=statistics.moments)


_METHODS: dict[str, Method] = {
    "rtn": rtn,
    "lsq": lsq,
    "hqq": hqq,
    "sinq": sinq,
    "sinq_lsq": sinq_lsq,
    "awq": awq,
    "gptq": gptq,
    "descent": descent,
}


def register_method(name: str, function: Method) -> Method:
    """Let recipes name a method of one's own: ``"w4g32a:name"``.

    Args:
        name: letters, digits and underscores; one that is registered already is refused.
        function: ``(weight, scheme, statistics) -> PackedWeights``, of that scheme and shape.

    Returns:
        The function.

    Raises:
        TypeError: if ``function`` cannot be called, or ``name`` is no string.
        ValueError: for another name, or one that is taken.

    Example:
        >>> from quantization import pack_matrix
        >>> _ = register_method("halved", lambda w, scheme, statistics: pack_matrix(w / 2, scheme))
        >>> fit_matrix(np.ones((1, 2), "float32"), "w8", "halved").dequantize()
        array([[0.5, 0.5]], dtype=float32)
    """
    if not isinstance(name, str) or not callable(function):
        raise TypeError(f"a method is a name and a function, not {name!r:.60} and {function!r:.60}")
    if not name.isidentifier():
        raise ValueError(
            f"the name of a method is letters, digits and underscores, not {name!r:.60}"
        )
    if name in _METHODS and _METHODS[name] is not function:
        raise ValueError(f"there is a method {name!r} already; choose another name")
    _METHODS[name] = function
    return function


def method_names() -> tuple[str, ...]:
    """The names of all methods.

    Example:
        >>> "lsq" in method_names()
        True
    """
    return tuple(_METHODS)


def method_of(method: str | Method) -> Method:
    """The function of a method, given by its name or as such.

    Raises:
        TypeError: if it is neither.
        ValueError: for a name of no method.
    """
    if callable(method):
        return method
    if not isinstance(method, str):
        raise TypeError(f"method must be a name or a function, not {method!r:.60}")
    if method not in _METHODS:
        hint = did_you_mean(method, _METHODS)
        raise ValueError(f"there is no method {method!r}; there are {', '.join(_METHODS)}{hint}")
    return _METHODS[method]


def method_name(method: str | Method) -> str:
    """What a method is called in reports."""
    return method if isinstance(method, str) else getattr(method, "__name__", repr(method))


def fit_matrix(
    weight: Tensor,
    scheme: Scheme | str,
    method: str | Method = "rtn",
    statistics: Statistics | None = None,
    *,
    nonfinite: str = "raise",
    name: str = "weight",
) -> PackedWeights:
    """A weight matrix packed by a method.

    Args:
        weight: ``[out, in]``, as :func:`quantization.pack_matrix` takes it.
        scheme: a :class:`quantization.Scheme`, or its short name.
        method: a name of :func:`method_names`, or a function of that kind.
        statistics: of the inputs, for methods that use them: :func:`quantization.calibrate`.
        nonfinite: ``"raise"``, or ``"mark"``: groups with a NaN or infinity become NaN, and the
            method sees 0 in its place.
        name: what error messages call the matrix.

    Raises:
        TypeError, ValueError: as :func:`quantization.pack_matrix` and the method raise them; or if
            what the method gives is not the matrix packed under that scheme.

    Example:
        >>> import torch
        >>> str(fit_matrix(torch.randn(8, 64), "nf4g32", "lsq").scheme)
        'nf4g32'
    """
    scheme, function = scheme_of(scheme), method_of(method)
    if statistics is not None and statistics.in_features != weight.shape[1]:
        raise ValueError(
            f"{name} has {weight.shape[1]} columns, and the statistics are of "
            f"{statistics.in_features}"
        )
    plain = partial(pack_matrix, weight, scheme, nonfinite=nonfinite, name=name)
    if native.is_meta(weight) or 0 in weight.shape:
        return plain()
    finite, marked = _finite(weight), None
    if finite is not weight:
        marked = plain()  # raises, with the place, unless it is to be marked
    packed = function(finite, scheme, statistics)
    _check_made(packed, scheme, tuple(weight.shape), method_name(method))
    return packed if marked is None else _with_marks(packed, marked)


def _finite(weight: Tensor) -> Tensor:
    """The same, with 0 for what is not finite."""
    if native.is_torch(weight):
        known = weight.isfinite()
        return weight if bool(known.all()) else weight.where(known, weight.new_zeros(()))
    array = np.asarray(native.to_array(native.cast(weight, "float64")))
    known = np.isfinite(array)
    return weight if known.all() else np.where(known, weight, np.zeros((), weight.dtype))


def _check_made(packed: Any, scheme: Scheme, shape: tuple[int, ...], name: str) -> None:
    if not isinstance(packed, PackedWeights):
        raise TypeError(f"the method {name} gave {packed!r:.60}; it must give PackedWeights")
    if (packed.scheme, packed.shape) != (scheme, shape):
        raise ValueError(
            f"the method {name} gave {packed.shape} under {packed.scheme}; it was asked for "
            f"{shape} under {scheme}"
        )


def _with_marks(packed: PackedWeights, marked: PackedWeights) -> PackedWeights:
    """Groups of NaN from rounding to nearest, all others from a method."""
    parts = {part: getattr(packed, part) for part in PARTS}
    name = "scales" if packed.scale_steps is None else "scale_steps"
    ours, theirs = (
        native.to_array(native.cast(getattr(p, name), "float32")) for p in (packed, marked)
    )
    if packed.scheme.grid == "mxfp4":
        is_nan = native.to_array(marked.scales) == 255
        codes = np.where(is_nan, 255, native.to_array(packed.scales)).astype("uint8")
        parts["scales"] = native.as_tensor_like(codes, "uint8", packed.scales)
    else:
        kept = np.where(np.isnan(theirs), theirs, ours)
        wide = native.as_tensor_like(kept, "float32", packed.packed_weights)
        parts[name] = native.cast(wide, name_of(getattr(packed, name).dtype))
    return PackedWeights(packed.scheme, packed.shape, **parts, dtype=packed.dtype)
