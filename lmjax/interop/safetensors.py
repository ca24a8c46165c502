"""Directories as Hugging Face writes them: config.json and safetensors, whole or in shards.

Nothing pickled is ever opened. Format: https://huggingface.co/docs/safetensors, sharded by an index
(model.safetensors.index.json) whose `weight_map` says which file holds which tensor.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import huggingface_hub
import ml_dtypes  # noqa: F401 (teaches NumPy the name bfloat16, which safetensors asks it for)
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lmjax.data.cache import atomic_directory

CONFIG = "config.json"
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DOWNLOADED = (
    CONFIG,
    "generation_config.json",
    "*.safetensors",
    INDEX,
    "spiece.model",
    "tokenizer*",
    "vocab.*",
    "merges.txt",
)
FLOATS = ("F32", "F16", "BF16", "F64")


def local_directory(path_or_repo: str | os.PathLike) -> Path:
    """The directory itself, or a local copy of a Hub repository ("google-t5/t5-small").

    Raises:
      FileNotFoundError: it is no directory, and cannot be downloaded (or found downloaded) either.
    """
    path = Path(path_or_repo).expanduser()
    if path.is_dir():
        return path
    name = str(path_or_repo)
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise FileNotFoundError(f"{name} is not a directory (nor spelled like a Hub repository)")
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(DOWNLOADED)))
    except Exception as error:  # from several network libraries, with no base in common
        reason = " ".join(str(error).split()).partition(". ")[0][:200]
        raise FileNotFoundError(
            f"{name} is no directory here, and downloading it from the Hugging Face Hub failed "
            f"({type(error).__name__}: {reason}): check the name and the network, or give the path "
            "of a directory"
        ) from error


def read_json(path: str | os.PathLike) -> dict:
    """A JSON object from a file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it holds something else; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}, so it is no model's directory")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): download or write it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}, not an object")
    return content


class Tensors:
    """The tensors of a directory, memory-mapped and read one at a time.

    Opening finds truncated and missing files, before any tensor is read.

    Raises:
      FileNotFoundError: no safetensors, or a shard is missing.
      ValueError: a file is damaged, or does not hold what the index says.
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = Path(directory)
        if (self.directory / WHOLE).is_file():
            file = _opened(self.directory / WHOLE)
            self._files = {key: (WHOLE, file) for key in file.keys()}
        elif (self.directory / INDEX).is_file():
            self._files = self._sharded()
        else:
            raise FileNotFoundError(
                f"{self.directory} has no {WHOLE} and no {INDEX}: pickled weights "
                "(pytorch_model.bin) are never opened here, so convert them once with transformers "
                "(model.save_pretrained(directory, safe_serialization=True)) and load the result"
            )

    def _sharded(self) -> dict:
        weights = read_json(self.directory / INDEX).get("weight_map")
        if not isinstance(weights, dict):
            raise ValueError(
                f"{self.directory / INDEX} has no weight_map, so the shards are unknown"
            )
        names = sorted(set(weights.values()))
        for name in names:
            if Path(name).name != name:
                raise ValueError(f"{self.directory / INDEX} names {name}, outside of its directory")
            if not (self.directory / name).is_file():
                raise FileNotFoundError(
                    f"{self.directory} has no {name}, which its {INDEX} lists: download it again"
                )
        files = {name: _opened(self.directory / name) for name in names}
        keys = {name: set(file.keys()) for name, file in files.items()}
        for key, name in weights.items():
            if key not in keys[name]:
                raise ValueError(
                    f"{self.directory / name} lacks {key}, which {INDEX} says it holds"
                )
        return {key: (name, files[name]) for key, name in weights.items()}

    def keys(self) -> set[str]:
        return set(self._files)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._files[key][1].get_slice(key).get_shape())

    def read(self, key: str, shape: tuple[int, ...]) -> np.ndarray:
        """A tensor as float32.

        Raises:
          ValueError: its shape is not `shape`, or it holds no floating-point numbers.
        """
        name, file = self._files[key]
        found = file.get_slice(key)
        if tuple(found.get_shape()) != tuple(shape) or found.get_dtype() not in FLOATS:
            raise ValueError(
                f"{key} in {self.directory / name} is {found.get_dtype()} {found.get_shape()}, but "
                f"{CONFIG} calls for one of {', '.join(FLOATS)} {list(shape)}"
            )
        return file.get_tensor(key).astype(np.float32, copy=False)


def _opened(path: Path):
    try:
        return safe_open(path, framework="np")
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated or damaged ({error}): download or write it again"
        ) from error


def write_tensors(
    directory: str | os.PathLike,
    tensors: Iterable[tuple[str, np.ndarray]],
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes into a new directory (see `lmjax.data.cache.atomic_directory`).

    A file holds at most `shard_bytes` of tensors, or a single larger one; where there are several,
    an index is written too. `tensors` are consumed one by one: no more than a file's worth of them
    is held.
    """
    directory, files, weights, total = Path(directory), 0, {}, 0
    shard: dict[str, np.ndarray] = {}

    def write_shard():
        nonlocal files
        files += 1
        # transformers refuses files that do not say which framework's layout they have.
        save_file(shard, directory / f"{files}.safetensors", metadata={"format": "pt"})
        weights.update(dict.fromkeys(shard, files))
        shard.clear()

    for key, tensor in tensors:
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > shard_bytes:
            write_shard()
        shard[key] = np.asarray(tensor, order="C")  # unlike ascontiguousarray, leaves scalars so
        total += tensor.nbytes
    write_shard()

    if files == 1:
        os.rename(directory / "1.safetensors", directory / WHOLE)
        return
    names = {n: f"model-{n:05}-of-{files:05}.safetensors" for n in range(1, files + 1)}
    for number, name in names.items():
        os.rename(directory / f"{number}.safetensors", directory / name)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {key: names[number] for key, number in weights.items()},
    }
    write_json(directory / INDEX, index)


def write_pretrained(
    directory: str | os.PathLike,
    tensors: Iterable[tuple[str, np.ndarray]],
    contents: Mapping[str, dict],
    tokenizer_files: Mapping[str, bytes],
    shard_bytes: int,
) -> None:
    """A whole directory of JSON `contents`, tensors and a tokenizer's files, or nothing.

    Raises:
      FileExistsError: the directory is there and not empty.
    """
    directory = Path(directory)
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()
    with atomic_directory(directory) as temporary:
        write_tensors(temporary, tensors, shard_bytes)
        for name, content in contents.items():
            write_json(temporary / name, content)
        for name, data in tokenizer_files.items():
            (temporary / name).write_bytes(data)


def write_json(path: str | os.PathLike, content: dict) -> None:
    Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
