"""From what a user types after `--model` to a model in memory, with what is needed to judge it.

Everything but the embedded model needs the extra: ``pip install "qwqa[demo]"``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantization.demo import char_model
from quantization.demo.model_download import WHEEL_MODELS, ModelError, fetch
from quantization.ops.extras import install_command, need

__all__ = ["LoadedModel", "ModelError", "load_model"]

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass
class LoadedModel:
    """A model with what is needed to judge it.

    Attributes:
        name: what the user asked for, short.
        source: where it came from, for a reader.
        kind: "characters" (the embedded model), "causal" (a language model of transformers) or
            "sentences" (an encoder, judged by mean-pooled embeddings).
        model: the module, in eval mode.
        tokenizer: of transformers; None for the embedded model.
        exclude: dotted names of the layers that stay float by default (the output layer).
    """

    name: str
    source: str
    kind: str
    model: nn.Module
    tokenizer: Any
    exclude: list[str]


def load_model(name: str | None = None, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Load a model in eval mode.

    Args:
        name: None for the embedded character model, a name in `WHEEL_MODELS`, a GGUF file, a
            transformers folder, or a hub name such as ``owner/model``.
        dtype: of the parameters.

    Raises:
        ModelError: it cannot be had or is not a model; the message says what to do.

    Example:
        >>> load_model().kind
        'characters'
    """
    if name is None:
        model = char_model.load().to(dtype)
        source = "embedded: a character-level transformer that knows the King James Bible"
        return LoadedModel("embedded", source, "characters", model, None, ["head"])
    if name in WHEEL_MODELS:
        _transformers(WHEEL_MODELS[name].gguf is not None)  # a missing extra is told before 90 MB
        folder, gguf = fetch(name), WHEEL_MODELS[name].gguf
        return _from_folder(folder, dtype, name, gguf)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} has no config.json: it is not a transformers folder")
        return _from_folder(path, dtype, path.resolve().name)
    if path.is_file():
        _require_gguf(path)
        return _from_folder(path.absolute().parent, dtype, path.name, path.name)
    return _from_hub(name, dtype)


def _require_gguf(path: Path) -> None:
    with path.open("rb") as stream:
        start = stream.read(4)
    if start != b"GGUF":
        raise ModelError(
            f"{path} is not a GGUF file (it starts with {start!r}); give a .gguf file, or the "
            "folder that holds config.json and the weights"
        )


def _from_hub(name: str, dtype: torch.dtype) -> LoadedModel:
    known = ", ".join(WHEEL_MODELS)
    if name.startswith((".", "/", "~")) or name.endswith(".gguf") or not _HUB_NAME.fullmatch(name):
        raise ModelError(
            f"there is no file or folder {name!r}; give a path that exists, a hub name, "
            f"or one of {known}"
        )
    try:
        return _from_folder(name, dtype, name)
    except ModelError as error:
        raise ModelError(
            f"{name!r} is no file or folder here, none of {known}, and the hub does not give it: "
            f"{error}"
        ) from error


def _transformers(gguf: bool) -> Any:
    """The transformers module, quiet; with `gguf`, what it needs to read GGUF is checked too."""
    wanted = ["transformers", "tokenizers", "safetensors"] + ["gguf", "accelerate"] * gguf
    for module in wanted:
        try:
            need(module, "demo")
        except ImportError as error:
            raise ModelError(
                f"this model needs {module}: {install_command('demo')} ({error.__cause__})"
            ) from error
    transformers: Any = need("transformers", "demo")
    transformers.logging.set_verbosity_error()
    return transformers


def _from_folder(
    folder: Path | str, dtype: torch.dtype, name: str, gguf: str | None = None
) -> LoadedModel:
    """Load what transformers can from a folder or hub name; `gguf` is a file in the folder."""
    transformers = _transformers(gguf is not None)
    options = {} if gguf is None else {"gguf_file": gguf}
    try:
        if gguf is None:
            kind = _kind_of(transformers.AutoConfig.from_pretrained(folder), folder)
        else:
            kind = "causal"
        factory = transformers.AutoModelForCausalLM if kind == "causal" else transformers.AutoModel
        model = factory.from_pretrained(folder, dtype=dtype, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    except ModelError:
        raise
    except Exception as error:  # transformers raises many kinds for a bad file
        raise ModelError(
            f"transformers cannot load {folder} {gguf or ''}: {_first(error)}"
        ) from error
    where = str(folder) if gguf is None else str(Path(folder) / gguf)
    return LoadedModel(name, where, kind, model.eval(), tokenizer, _output_layer(model))


def _first(error: Exception) -> str:
    """The first line of an error, with its kind."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _kind_of(config: Any, folder: Path | str) -> str:
    architecture = (getattr(config, "architectures", None) or ["unnamed"])[0]
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{folder} holds {architecture}, an encoder-decoder; this suite judges causal language "
            "models and encoders (the layers can be replaced in any model)"
        )
    causal = architecture.endswith(("ForCausalLM", "LMHeadModel"))
    return "causal" if causal else "sentences"


def _output_layer(model: nn.Module) -> list[str]:
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return [
        name for name, module in model.named_modules() if output is not None and module is output
    ]
