"""Tokenizers in GGUF: byte-level BPE out of a tokenizer.json, and back by transformers."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from quantization.formats.errors import FormatError
from quantization.formats.gguf.header import read_header
from quantization.ops.extras import need

__all__ = ["save_tokenizer", "write_tokenizer"]

_log = logging.getLogger("quantization")

_SPECIAL = ("bos", "eos", "pad", "unk")
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # gguf.TokenType
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
#: Ways to cut text before it is encoded that llama.cpp has a name for.
_CUTS = {_WORDS: "llama-bpe", _WORDS.replace("{1,3}", ""): "qwen2"}


def write_tokenizer(writer: Any, assets: Iterable[Path], config: Mapping[str, Any]) -> None:
    """Give a GGUFWriter the tokenizer among the files of a model, if it is of a kind it has.

    Byte-level BPE (of GPT-2, SmolLM, Llama 3, Qwen) is written; of another tokenizer, or none, the
    numbers of special tokens alone, and the logger ``quantization`` says so.

    Raises:
        FormatError: if the tokenizer has more tokens than the model.
    """
    special = {kind: _first(config.get(f"{kind}_token_id")) for kind in _SPECIAL}
    special = {kind: number for kind, number in special.items() if isinstance(number, int)}
    file = next((path for path in assets if path.name == "tokenizer.json"), None)
    plain = None if file is None else json.loads(file.read_text("utf-8"))
    if file is None or not _is_byte_level(plain):
        if file is not None:
            _log.warning("%s is left out: it is no byte-level BPE tokenizer", file)
        for kind, number in special.items():
            getattr(writer, f"add_{kind}_token_id")(number)
        return
    texts, kinds = _tokens(plain, config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_cut(plain, file))
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    vocabulary = need("gguf", "gguf").SpecialVocab(
        file.parent, load_merges=True, n_vocab=len(texts)
    )
    vocabulary.special_token_ids = special | vocabulary.special_token_ids
    vocabulary.add_to_gguf(writer, quiet=True)


def save_tokenizer(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """Save the tokenizer of a GGUF file as transformers does, by transformers.

    Raises:
        ImportError: if transformers is not installed.
        FormatError: if the file is damaged, or has no tokenizer that transformers reads.

    Example:
        >>> save_tokenizer("model.gguf", "model")  # doctest: +SKIP
    """
    transformers, path = need("transformers", "demo"), Path(path).resolve()
    if "tokenizer.ggml.model" not in read_header(path).facts:
        raise FormatError(f"{path} has no tokenizer")
    with tempfile.TemporaryDirectory() as alone:  # files beside it would be looked at, too
        (Path(alone) / path.name).symlink_to(path)
        try:
            made = transformers.AutoTokenizer.from_pretrained(alone, gguf_file=path.name)
        except Exception as error:  # transformers raises many kinds
            raise FormatError(f"transformers reads no tokenizer of {path}: {error}") from error
        made.save_pretrained(folder)


def _first(number: Any) -> Any:
    return number[0] if isinstance(number, list) and number else number


def _is_byte_level(plain: Any) -> bool:
    model, decoder = plain.get("model") or {}, plain.get("decoder") or {}
    is_bpe = model.get("type") == "BPE" and not model.get("byte_fallback")
    return is_bpe and decoder.get("type") == "ByteLevel"


def _tokens(plain: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Texts and kinds of all tokens of a model, in order; those that are none are unused."""
    found = {number: (text, _NORMAL) for text, number in plain["model"]["vocab"].items()}
    for token in plain.get("added_tokens") or ():
        kind = _CONTROL if token.get("special") else _USER_DEFINED
        found[token["id"]] = (token["content"], kind)
    if found and max(found) >= size:
        raise FormatError(f"the tokenizer has a token {max(found)}, the model only {size} tokens")
    both = [found.get(number, (f"[PAD{number}]", _UNUSED)) for number in range(size)]
    return [text for text, _ in both], [kind for _, kind in both]


def _cut(plain: Mapping[str, Any], file: Path) -> str:
    """What llama.cpp calls the way in which a tokenizer cuts text before it encodes the parts."""
    steps = plain.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and steps[0]["pattern"].get("Regex") in _CUTS:
        return _CUTS[steps[0]["pattern"]["Regex"]]
    _log.warning("%s cuts text in a way without a name in GGUF: it is called default", file)
    return "default"
