"""Made packed.json, once: every layout packed by the NumPy oracle and by compressed-tensors.

The file is frozen: files written by any released version must stay readable. Run this only to add
cases of a new layout: `python tests/golden/make_packed.py > tests/golden/packed.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests import pack_oracle


def case(codes: np.ndarray, packed: np.ndarray, maker: str, **layout: object) -> dict:
    return {
        "maker": maker,
        **layout,
        "shape": codes.shape,
        "codes": codes.astype(np.int8).tobytes().hex(),
        "packed_shape": packed.shape,
        "packed": packed.astype(packed.dtype.newbyteorder("<")).tobytes().hex(),
    }


def oracle_cases(rng: np.random.Generator) -> list[dict]:
    cases = []
    for bits in range(1, 9):
        for container, dim, straddle in ((1, 0, 0), (1, 1, 1), (2, 1, 0), (4, 0, 1), (8, 1, 0)):
            half = 1 << (bits - 1)
            codes = rng.integers(-half, half, (11, 13))
            layout = "dense" if straddle else "aligned"
            packed = pack_oracle.pack(codes.astype(np.int8), bits, container, dim, bool(straddle))
            dtype = f"uint{8 * container}"
            cases.append(
                case(codes, packed, "oracle", bits=bits, layout=layout, dtype=dtype, dim=dim)
            )
    codes = rng.integers(-1, 2, (6, 13))
    packed = pack_oracle.pack_ternary(codes % 3)
    cases.append(case(codes, packed, "oracle", bits=2, layout="base3", dtype="uint8", dim=1))
    return cases


def compressed_tensors_cases(rng: np.random.Generator) -> list[dict]:
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    cases = []
    for bits in range(1, 9):
        half = 1 << (bits - 1)
        for dim in (0, 1):
            codes = rng.integers(-half, half, (9, 37))
            packed = pack_to_int32(torch.from_numpy(codes.astype(np.int8)), bits, dim).numpy()
            layout = {"bits": bits, "layout": "dense", "dtype": "int32", "dim": dim}
            cases.append(case(codes, packed, "compressed-tensors", **layout))
    return cases


if __name__ == "__main__":
    rng = np.random.default_rng(20)
    cases = oracle_cases(rng) + compressed_tensors_cases(rng)
    print("[\n" + ",\n".join(json.dumps(one) for one in cases) + "\n]")
