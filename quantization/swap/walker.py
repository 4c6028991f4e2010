"""Walk a model: every module under all its names.

Nothing here calls itself, so a model may be nested as deep as memory allows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import nn

from quantization.layers.float_layers import is_script

#: A module that hangs in more places than this has its inside listed under so many names only.
_MAX_LISTINGS = 64


class Site(NamedTuple):
    """One place where a module hangs: ``parent._modules[key] is module``; the root has no parent.

    ``name`` is the dotted name, ``""`` for the root.
    """

    name: str
    parent: nn.Module | None
    key: str
    module: nn.Module


def walk(root: nn.Module) -> Iterator[Site]:
    """Every place of every module, parents first, in the order of ``named_modules``.

    A module that hangs in two places comes twice, with its children under both names. The inside of
    a TorchScript module is not listed: it is compiled, and nothing in it can be changed.

    Example:
        >>> shared = nn.Linear(2, 2)
        >>> [site.name for site in walk(nn.Sequential(shared, nn.Sequential(shared)))]
        ['', '0', '1', '1.0']
    """
    listings: Counter[int] = Counter()
    stack = [Site("", None, "", root)]
    while stack:
        site = stack.pop()
        yield site
        if listings[id(site.module)] >= _MAX_LISTINGS or is_script(site.module):
            continue
        listings[id(site.module)] += 1
        prefix = site.name + "." if site.name else ""
        children = [
            Site(prefix + key, site.module, key, child)
            for key, child in site.module._modules.items()
            if child is not None
        ]
        stack.extend(reversed(children))


def inherit(sites: Iterable[Site], own: dict[int, str]) -> dict[int, str]:
    """``own`` (a text for some module ids) handed down from each module to all that it holds."""
    texts = dict(own)
    for site in sites:
        if site.parent is not None and id(site.parent) in texts:
            texts.setdefault(id(site.module), texts[id(site.parent)])
    return texts


def adapters(sites: list[Site]) -> dict[int, str]:
    """Ids of the modules inside an adapter layer (PEFT's LoRA and its kin) -> why they are left."""
    own = {
        id(site.module): (
            f"part of the adapter layer {type(site.module).__module__}."
            f"{type(site.module).__qualname__}: merge it first, or quantize before it is added"
        )
        for site in sites
        if "base_layer" in site.module._modules
    }
    return inherit(sites, own)
