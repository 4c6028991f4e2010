"""What a replacement puts in the place of a linear layer: a value that names the class."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

_KEYWORDS = ("in_features", "out_features", "bias", "dtype")


class Target:
    """What to replace and by which class. Today there is one kind: :class:`Target.Linear`.

    Values are immutable, hashable and work in ``match``.

    Example:
        >>> from quantization import QWQALinearLayer
        >>> match Target.Linear(QWQALinearLayer):
        ...     case Target.Linear(cls):
        ...         print(cls.__name__)
        QWQALinearLayer
    """

    Linear: ClassVar[type[_Linear]]


@dataclass(frozen=True)
class _Linear(Target):
    """Linear layers, to be replaced by ``cls``.

    Attributes:
        cls: an nn.Module class with the keyword constructor ``in_features``, ``out_features``,
            ``bias``, ``dtype`` and a method ``quantize(weights)`` that takes the float weight,
            ``[out_features, in_features]``. A classmethod ``from_float(linear)``, if it has one,
            is used instead of the two.

    Raises:
        TypeError: if ``cls`` is not such a class; the message says what it lacks.
    """

    cls: type[nn.Module]

    def __post_init__(self) -> None:
        lacks = _what_it_lacks(self.cls)
        if lacks:
            raise TypeError(f"Target.Linear cannot take {self.cls!r}: {lacks}")


_Linear.__name__, _Linear.__qualname__ = "Linear", "Target.Linear"
Target.Linear = _Linear


def _what_it_lacks(cls: Any) -> str | None:
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        return "it must be a class derived from torch.nn.Module"
    if not callable(getattr(cls, "quantize", None)):
        return "the class needs a method quantize(weights)"
    try:
        arguments = dict(zip(_KEYWORDS, (1, 1, True, torch.float32), strict=True))
        inspect.signature(cls).bind(**arguments)
    except TypeError as error:
        return f"its constructor must take the keywords {', '.join(_KEYWORDS)} ({error})"
    return None


def target_class_from(target: Any) -> type[nn.Module]:
    """The class that a target names; a bare class of the right kind is accepted too.

    Raises:
        TypeError: if it is neither, or the class lacks what :class:`Target.Linear` asks for.

    Example:
        >>> from quantization import QWQALinearLayer
        >>> target_class_from(Target.Linear(QWQALinearLayer)).__name__
        'QWQALinearLayer'
        >>> target_class_from(QWQALinearLayer).__name__
        'QWQALinearLayer'
    """
    match target:
        case Target.Linear(cls):
            return cls
        case type():
            return Target.Linear(target).cls
    raise TypeError(
        f"the target is {target!r}; give Target.Linear(QWQALinearLayer), or a class with the "
        f"keyword constructor {', '.join(_KEYWORDS)} and a method quantize(weights)"
    )
