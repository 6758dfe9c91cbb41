"""Reads files of weights, running nothing in them, or says what a file is instead."""

import io
import json
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils import UserError, one_line

SAVED_AS = ("last.pt", "model.safetensors", "pytorch_model.bin")  # in a folder: ours, or others'
NOT_WEIGHTS = {  # how files begin that are mistaken for weights
    b"version https://git-lfs": "a git-lfs pointer; `git lfs pull` fetches the file itself",
    b"<": "a web page; download the file that it shows",
    b"\x89HDF": "an HDF5 file, as Keras writes them, not weights of PyTorch",
}
STATE_DICT = "where it was made, torch.save(model.state_dict(), 'weights.pth') writes what is read"
TORCH_BEGINS = b"PK", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # since torch 1.6, and before


def read_weights(path: Path) -> Any:
    """The content of a torch.save, safetensors or numpy (.npz) file, or of a library's folder.

    Objects beside the weights, such as an argparse.Namespace, are left out.

    Raises:
        UserError: the file cannot be read, or is something else.
    """
    if path.is_dir():
        names = [name for name in SAVED_AS if (path / name).exists()]
        if not names:
            raise UserError(f"{path} has none of {', '.join(SAVED_AS)}")
        path = path / names[0]
    content = read_bytes(path)
    try:
        if content[8:9] == b"{" or path.suffix == ".safetensors":
            import safetensors.torch

            return safetensors.torch.load(content)
        if zipfile.is_zipfile(io.BytesIO(content)) and b".npy" in content[:200]:
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except ImportError as error:
        raise UserError(f"{path} needs safetensors: pip install safetensors") from error
    except Exception as error:  # a damaged file can fail in any way
        raise UserError(f"{path} is not a whole file of weights: {one_line(error)}") from error
    return _load_torch(path, content, known=[])


def read_torch(path: Path) -> Any:
    """The content of a torch.save file, on the CPU: only containers and tensors."""
    return _load_torch(path, read_bytes(path), known=None)


def read_json(path: Path) -> dict[str, Any]:
    content = read_bytes(path)
    try:
        return dict(json.loads(content))
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is not an object of JSON: {one_line(error)}") from error


def read_bytes(path: Path) -> bytes:
    """The content of a file; UserError if that shows that it is not a file of weights."""
    try:
        if path.exists() and not path.is_file():  # reading a pipe might never end
            raise OSError("it is not a regular file")
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if not content:
        raise UserError(f"{path} is empty; copy or download it again")
    for beginning, what in NOT_WEIGHTS.items():
        if content[:512].lstrip().startswith(beginning):
            raise UserError(f"{path} is {what}")
    return content


class _Object:
    """Stands in for a class that torch does not know; none of its code runs."""

    def __new__(cls, *_: Any) -> OrderedDict:
        return OrderedDict()  # torch adds the object's entries and attributes to it


class _NumpyObject:
    """The same for numpy's scalars and arrays, whose state is not a dict."""

    def __init__(self, *_: Any): ...

    def __setstate__(self, _: Any): ...


def _load_torch(path: Path, content: bytes, known: list[tuple[type, str]] | None) -> Any:
    """Loads what torch.save wrote.

    `known` lists stand-ins for classes, by name, that the file may contain; missing ones are
    added. If it is None, the file may contain only containers and tensors.
    """
    file = io.BytesIO(content)
    try:
        if zipfile.is_zipfile(file):  # torch before 1.6 wrote no zip
            with zipfile.ZipFile(file) as archive:
                if damaged := archive.testzip():  # torch.load does not check this
                    raise zipfile.BadZipFile(damaged)
        file.seek(0)
        with (
            warnings.catch_warnings(action="ignore"),
            torch.serialization.safe_globals(known or []),
        ):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail in any way inside zipfile and torch.load
        unknown = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
        if not unknown or known is None:
            raise UserError(f"{path} {_what_failed(content, error)}") from error
    name = unknown[1] if "." in unknown[1] else f"builtins.{unknown[1]}"
    stands_for_it = _NumpyObject if name.startswith("numpy") else _Object
    return _load_torch(path, content, [*known, (stands_for_it, name)])


def _what_failed(content: bytes, error: Exception) -> str:
    if not content.startswith(TORCH_BEGINS):
        return "is not a file of weights"
    if isinstance(error, pickle.UnpicklingError) or "TorchScript" in str(error):
        return f"holds more than tensors in plain containers; {STATE_DICT}"
    return "is damaged or cut off; copy or download it again"
