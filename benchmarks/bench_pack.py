"""Codes of 1..8 bits to dense bytes and back, against torch expressions and NumPy's packbits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from benchmarks.formulas import Stream
from benchmarks.harness import Candidate
from benchmarks.session import Session, any_isa, shape_name
from benchmarks.streams import Trip, run_trip
from quantization import pack_weights, set_isa, unpack_weights

EXPRESSION, PACKBITS = "torch expression", "np.packbits"
LAYOUTS = {"aligned": 0, "dense": 1}  # layout: the dimension that is packed


@dataclass(frozen=True)
class Form:
    """One way to pack, as the package says it and as one writes it in torch.

    Attributes:
        bits: of a code.
        layout: a key of `LAYOUTS`.
    """

    bits: int
    layout: str

    @property
    def dim(self) -> int:
        """The dimension that is packed."""
        return LAYOUTS[self.layout]

    @property
    def codes_a_byte(self) -> int:
        """Whole codes that fit in a byte."""
        return 8 // self.bits

    @property
    def bytes_a_code(self) -> float:
        """Bytes of a packed code."""
        return 1 / self.codes_a_byte if self.layout == "aligned" else self.bits / 8

    @property
    def is_strided(self) -> bool:
        """Whether shifted slices can be or-ed: no code straddles two bytes."""
        return self.layout == "aligned" or 8 % self.bits == 0

    def slice_of(self, index: int) -> tuple[slice, ...]:
        """Every code that lies at a place in its byte."""
        every = slice(index, None, self.codes_a_byte)
        return (every,) if self.dim == 0 else (slice(None), every)

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """The torch expression."""
        if not self.is_strided:
            return _fold(_bits_of(codes, self.bits), 8, codes.shape)
        packed = codes[self.slice_of(0)].clone()
        for index in range(1, self.codes_a_byte):
            packed |= codes[self.slice_of(index)] << (self.bits * index)
        return packed

    def unpack(self, packed: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The torch expression of the way back."""
        if not self.is_strided:
            return _fold(_bits_of(packed, 8), self.bits, shape)
        codes = torch.empty(shape, dtype=torch.uint8)
        mask = (1 << self.bits) - 1
        for index in range(self.codes_a_byte):
            codes[self.slice_of(index)] = (packed >> (self.bits * index)) & mask
        return codes


def _bits_of(values: torch.Tensor, bits: int) -> torch.Tensor:
    """The low bits of each byte, one a byte, lowest first."""
    return (values.unsqueeze(2) >> torch.arange(bits, dtype=torch.uint8)) & 1


def _fold(single: torch.Tensor, bits: int, shape: torch.Size) -> torch.Tensor:
    """Numbers of `bits` bits made of single bits, along the last dimension."""
    places = torch.ones(bits, dtype=torch.uint8) << torch.arange(bits, dtype=torch.uint8)
    return (single.view(shape[0], -1, bits) * places).sum(-1, dtype=torch.uint8)


def run_pack(session: Session) -> None:
    """Measure the section, and print a table for each cell."""
    settings = session.settings
    forms = [Form(bits, layout) for layout in LAYOUTS for bits in settings.widths]
    generator = torch.Generator().manual_seed(0)
    with session.progress("pack", 2 * len(forms) * len(settings.threads)), any_isa():
        for form in forms:
            size = (1 << form.bits, settings.matrix)
            codes = torch.randint(0, *size, dtype=torch.uint8, generator=generator)
            for threads in settings.threads:
                _run_form(session, form, codes, threads)


def _run_form(session: Session, form: Form, codes: torch.Tensor, threads: int) -> None:
    packed = form.pack(codes)
    keywords = {"layout": form.layout, "dim": form.dim}
    pack = partial(pack_weights, codes, form.bits, **keywords)
    unpack = partial(unpack_weights, packed, form.bits, size=codes.shape[form.dim], **keywords)
    others = _packbits(form, codes, packed)
    ways = {
        "pack": (pack, partial(form.pack, codes), packed, Stream(1, form.bytes_a_code)),
        "unpack": (
            unpack,
            partial(form.unpack, packed, codes.shape),
            codes,
            Stream(form.bytes_a_code, 1),
        ),
    }
    for way, (ours, expression, truth, stream) in ways.items():
        candidates = [Candidate(EXPRESSION, "expression", expression)]
        candidates += [
            Candidate(f"ours {isa}", "ours", ours, partial(set_isa, isa))
            for isa in session.settings.isas
        ]
        case = {"way": way, "bits": form.bits, "layout": f"{form.layout}, dim {form.dim}"}
        case |= {"shape": shape_name(codes.shape), "threads": threads}
        trip = Trip(
            "pack", case, candidates + others.get(way, []), EXPRESSION, stream, codes.numel(),
            threads, partial(torch.equal, truth),
        )  # fmt: skip
        run_trip(session, trip)


def _packbits(form: Form, codes: torch.Tensor, packed: torch.Tensor) -> dict[str, list[Candidate]]:
    """NumPy's functions for single bits."""
    if form.bits != 1:
        return {}
    options = {"axis": form.dim, "bitorder": "little"}
    pack = partial(np.packbits, codes.numpy(), **options)
    unpack = partial(np.unpackbits, packed.numpy(), **options)
    return {
        "pack": [Candidate(PACKBITS, "expression", pack)],
        "unpack": [Candidate("np.unpackbits", "expression", unpack)],
    }
