"""What comes along with a checkpoint: the files beside its tensors that belong to the model."""

from __future__ import annotations

import os
from pathlib import Path

from quantization.checkpoint.disk.json_files import CheckpointError, parse_any, read_text
from quantization.checkpoint.disk.safetensors_files import INDEX, TensorFolder
from quantization.checkpoint.format import CONFIG, FILE

__all__ = ["assets_of", "inner_files"]

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")
_MODULES = "modules.json"  # of sentence-transformers: [{"path": a sub-folder}]


def assets_of(files: TensorFolder) -> tuple[Path, ...]:
    """Small files beside the tensors that belong to the model."""
    own = {*files.files, INDEX, CONFIG}
    return tuple(
        path
        for path in sorted(files.path.iterdir())
        if path.is_file() and path.name not in own and not path.name.endswith(_WEIGHTS)
        and not path.name.endswith(".index.json")
    )  # fmt: skip


def inner_files(folder: Path) -> tuple[dict[str, Path], tuple[str, ...]]:
    """The files of a folder's sub-folders that belong to the model, by name; and what is left.

    A sub-folder that holds weights is a model of its own (a checkpoint of a training, an export)
    and is left, but where ``modules.json`` of sentence-transformers names it: its weights belong to
    the model then and stay as they are. What was quantized already is left, and so are links to
    folders and links that lead out of the folder; but into the blobs beside the snapshots of a
    model hub's cache links are followed. Folders whose names begin with a dot are passed over.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     for name in ("1_Pooling/config.json", "onnx/model.onnx"):
        ...         Path(place, name).parent.mkdir()
        ...         Path(place, name).touch()
        ...     kept, left = inner_files(Path(place))
        >>> list(kept), left
        (['1_Pooling/config.json'], ('onnx/',))
    """
    modules, kept, left = _modules_of(folder), {}, []
    for place, folders, names in os.walk(folder, onerror=_raise):
        here = Path(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in [here / name for name in folders]:
            if not _belongs(path, folder, modules):
                folders.remove(path.name)
                left.append(f"{path.relative_to(folder).as_posix()}/")
        for path in sorted(here / name for name in names if here != folder):
            name = path.relative_to(folder).as_posix()
            if path.is_file() and _is_inside(path, folder):
                kept[name] = path
            else:
                left.append(name)
    return kept, tuple(left)


def _modules_of(folder: Path) -> set[Path]:
    """The sub-folders that a ``modules.json`` names."""
    try:
        plain = parse_any(read_text(folder / _MODULES), _MODULES)
    except (OSError, CheckpointError):
        return set()
    entries = plain if isinstance(plain, list) else []
    paths = [entry.get("path") for entry in entries if isinstance(entry, dict)]
    return {folder / path for path in paths if isinstance(path, str)} - {folder}


def _belongs(path: Path, folder: Path, modules: set[Path]) -> bool:
    """Whether a sub-folder is part of the model."""
    if path.is_symlink() or (path / FILE).is_file():
        return False
    has_weights = any(file.name.endswith(_WEIGHTS) for file in path.iterdir())
    return not has_weights or not modules.isdisjoint((path, *path.parents))


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether a file lies where it seems to, or is a link within the folder or to hub blobs."""
    real, home = path.resolve(), folder.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    return not path.is_symlink() or real.is_relative_to(home) or real.is_relative_to(blobs)


def _raise(error: OSError) -> None:
    raise error
