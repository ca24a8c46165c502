"""Parameters to and from the tensors of a Hugging Face file, by one table per model.

A table says of every parameter, named by its path in our tree, where it is in a file. Both
directions follow it.
"""

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from lmjax.data.tokenizers import Tokenizer
from lmjax.interop.safetensors import CONFIG, Tensors, write_pretrained


class Source(NamedTuple):
    """Where a parameter is in a file."""

    key: str
    """`{}` in it is the layer, where the parameter is stacked."""
    transposed: bool = False
    """Kernels are, where the file is PyTorch's: it stores [out, in]."""
    part: tuple[int, int] | None = None
    """(i, n): the i-th of n equal parts of the tensor, along its last axis."""
    shape: tuple[int, ...] | None = None
    """Of the tensor, where the file keeps axes apart that we join."""


Table = Mapping[str, Source]


def import_params(
    table: Table, shapes: Any, tensors: Tensors, *, ignored: Collection[str] = (), system: str
) -> Any:
    """A tree as `shapes`, of float32 NumPy arrays, read one tensor at a time into stacked arrays.

    Args:
      ignored: keys that a file may hold beside those of the table.
      system: names the model in errors.

    Raises:
      ValueError: tensors are missing, left over, or of another shape than `shapes` says.
    """
    keys, wanted = tensors.keys(), set()
    for path, shape in _leaves(shapes).items():
        wanted |= {key for key, _ in _tensors(table[path], shape)}
    _refuse(wanted - keys, f"{tensors.directory} lacks", "which its config calls for")
    left = keys - wanted - set(ignored)
    article = "an" if system[0] in "AEIOUX" else "a"
    _refuse(
        left,
        f"{tensors.directory} holds",
        f"which {article} {system} of its config has no place for",
    )

    def read(path, parameter) -> np.ndarray:
        source = table[_name(path)]
        array = np.empty(parameter.shape, np.float32)
        for key, index in _tensors(source, parameter):
            into = array[index]
            into = into.T if source.transposed else into
            shape = source.shape or into.shape
            into[...] = _read(tensors, key, shape, source.part).reshape(into.shape)
        return array

    return jax.tree_util.tree_map_with_path(read, shapes)


def export_tensors(table: Table, shapes: Any, params: Any) -> Iterator[tuple[str, np.ndarray]]:
    """(key, float32 array) of every tensor of a file, one at a time.

    Raises:
      ValueError: `params` are not shaped as `shapes`.
    """
    wanted, leaves = _leaves(shapes), _leaves(params)
    for name in sorted({*wanted, *leaves}):
        expected, found = (
            tuple(np.shape(t[name])) if name in t else None for t in (wanted, leaves)
        )
        if expected != found:
            raise ValueError(
                f"params: {name} is {found or 'absent'}, but the config has {expected}"
            )
    done = set()
    for name in leaves:
        source = table[name]
        if source.key in done:
            continue
        done.add(source.key)
        # The parameters that share a tensor, in their order in it.
        names = sorted((n for n in leaves if table[n].key == source.key), key=lambda n: table[n])
        arrays = [np.asarray(leaves[n], np.float32) for n in names]
        for key, index in _tensors(source, arrays[0]):
            parts = [array[index].T if source.transposed else array[index] for array in arrays]
            whole = np.concatenate(parts, -1) if len(parts) > 1 else parts[0]
            yield key, whole.reshape(source.shape or whole.shape)


def head(
    content: dict[str, Any], architectures: Mapping[str, str], kind: str, labels: int
) -> dict[str, Any]:
    """The fields `kind` and `labels` of the model that a config.json describes.

    Args:
      architectures: what a config.json may name -> kind; of others nothing is known.
      kind, labels: where it says nothing.
    """
    named = (architectures[a] for a in content.get("architectures", ()) if a in architectures)
    return {"kind": next(named, kind), "labels": len(content.get("id2label", range(labels)))}


def label_names(count: int) -> dict[str, Any]:
    """What a config.json says of the classes that a classifier tells apart."""
    names = [f"LABEL_{i}" for i in range(count)]
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


def _tensors(source: Source, parameter: Any) -> Iterator[tuple[str, Any]]:
    """(key, index into the parameter) of each tensor of a file that makes up a parameter."""
    if "{}" not in source.key:
        yield source.key, ...
        return
    for layer in range(parameter.shape[0]):
        yield source.key.format(layer), layer


def _read(tensors: Tensors, key: str, shape: tuple[int, ...], part) -> np.ndarray:
    if part is None:
        return tensors.read(key, shape)
    index, count = part
    whole = tensors.read(key, (*shape[:-1], shape[-1] * count))
    return np.split(whole, count, axis=-1)[index]


def check_vocabulary(config: Any, tokenizer: Any) -> None:
    """Raises ValueError if the tokenizer has ids that the embedding has no rows for."""
    if tokenizer.vocab_size > config.vocab:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids but the model's vocabulary only "
            f"{config.vocab} rows: use the tokenizer that the model was trained with"
        )


def save(
    directory: str | os.PathLike,
    config: Any,
    content: dict[str, Any],
    tensors: Iterable[tuple[str, np.ndarray]],
    tokenizer: Tokenizer | None,
    shard_bytes: int,
    others: Mapping[str, dict[str, Any]] | None = None,
) -> None:
    """Writes a directory that `transformers` and `lmjax.load` read, whole or not at all.

    Args:
      content: of its config.json.
      others: of further JSON files, by name.

    Raises:
      FileExistsError: the directory is there and not empty.
      ValueError: the tokenizer does not fit `config`.
    """
    files = {}
    if tokenizer is not None:
        check_vocabulary(config, tokenizer)
        files = tokenizer.files()
    write_pretrained(directory, tensors, {CONFIG: content, **(others or {})}, files, shard_bytes)


def refuse_other_copies(tensors: Tensors, key: str, copies: Collection[str], why: str) -> None:
    """Raises ValueError if the file holds one of `copies` and it is not what `key` holds."""
    shape = tensors.shape(key)
    for copy in sorted(tensors.keys() & set(copies)):
        if not np.array_equal(tensors.read(copy, shape), tensors.read(key, shape)):
            raise ValueError(f"{copy} in {tensors.directory} differs from {key}, but {why}")


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _leaves(tree) -> dict[str, Any]:
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _refuse(keys: Collection[str], before: str, after: str) -> None:
    if keys:
        more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
        raise ValueError(f"{before} {min(keys)}{more}, {after}")
