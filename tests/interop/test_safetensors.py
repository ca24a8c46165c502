import json
import os
import subprocess
import sys

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from lmjax.interop.safetensors import Tensors, local_directory, read_json, write_tensors

TENSORS = {name: np.arange(12, dtype="f4").reshape(3, 4) + i for i, name in enumerate("abcde")}


@pytest.fixture
def sharded(tmp_path):
    """Two tensors of 48 bytes a file."""
    write_tensors(tmp_path, TENSORS.items(), shard_bytes=100)
    return tmp_path


def test_what_is_written_is_read(tmp_path):
    write_tensors(tmp_path, TENSORS.items())
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    tensors = Tensors(tmp_path)
    assert tensors.keys() == TENSORS.keys()
    for key, expected in TENSORS.items():
        np.testing.assert_array_equal(tensors.read(key, (3, 4)), expected)


def test_shards_are_full_and_indexed(sharded):
    assert sorted(p.name for p in sharded.iterdir()) == [
        *(f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)),
        "model.safetensors.index.json",
    ]
    index = read_json(sharded / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == 5 * 48
    assert [name[6:11] for name in index["weight_map"].values()] == ["00001"] * 2 + [
        "00002"
    ] * 2 + ["00003"]
    tensors = Tensors(sharded)
    for key, expected in TENSORS.items():
        np.testing.assert_array_equal(tensors.read(key, (3, 4)), expected)


def test_a_tensor_above_the_limit_has_a_file_of_its_own(tmp_path):
    large = {"small": np.zeros(2, "f4"), "large": np.zeros(100, "f4"), "last": np.zeros(2, "f4")}
    write_tensors(tmp_path, large.items(), shard_bytes=100)
    assert (
        len(set(read_json(tmp_path / "model.safetensors.index.json")["weight_map"].values())) == 3
    )


def test_views_are_written_as_they_look(tmp_path):
    write_tensors(tmp_path, [("a", TENSORS["a"].T)])
    np.testing.assert_array_equal(Tensors(tmp_path).read("a", (4, 3)), TENSORS["a"].T)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_every_float_is_read_as_float32(tmp_path, dtype):
    save_file({"a": (TENSORS["a"] / 3).astype(dtype)}, tmp_path / "model.safetensors")
    found = Tensors(tmp_path).read("a", (3, 4))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, (TENSORS["a"] / 3).astype(dtype).astype(np.float32))


def test_integers_and_other_shapes_are_refused_by_name(tmp_path):
    save_file({"ids": np.arange(3), **TENSORS}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"ids in .*model.safetensors is I64 \[3\]"):
        Tensors(tmp_path).read("ids", (3,))
    with pytest.raises(ValueError, match=r"a in .*model.safetensors is F32 \[3, 4\], .* \[4, 3\]"):
        Tensors(tmp_path).read("a", (4, 3))


# --- damage


@pytest.mark.parametrize("damage", [lambda b: b[:-5], lambda b: b[:4], lambda b: b"\xff" * len(b)])
@pytest.mark.parametrize("name", ["model.safetensors", "model-00002-of-00003.safetensors"])
def test_a_damaged_file_is_named(tmp_path, name, damage):
    write_tensors(tmp_path, TENSORS.items(), 100 if "-" in name else 10**9)
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises(ValueError, match=f"{name} is truncated or damaged .*again"):
        Tensors(tmp_path)


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no model-00002-of-00003.safetensors, which"):
        Tensors(sharded)


def test_an_index_that_is_wrong_is_named(sharded):
    file = sharded / "model.safetensors.index.json"
    index = read_json(file)
    index["weight_map"]["f"] = "model-00001-of-00003.safetensors"
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="model-00001-of-00003.safetensors lacks f, which"):
        Tensors(sharded)
    index["weight_map"] = {"a": "../elsewhere.safetensors"}
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names ../elsewhere.safetensors, outside"):
        Tensors(sharded)
    for content, message in (("{}", "has no weight_map"), ("{", "is no JSON"), ("[]", "JSON list")):
        file.write_text(content)
        with pytest.raises(ValueError, match=f"index.json .*{message}|index.json {message}"):
            Tensors(sharded)


def test_pickles_are_not_opened(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    with pytest.raises(FileNotFoundError, match="pickled weights .* safe_serialization=True"):
        Tensors(tmp_path)


# --- where


def test_a_directory_is_used_where_it_is(tmp_path):
    assert local_directory(tmp_path) == tmp_path


@pytest.mark.parametrize("path", ["/no/such/directory", "./nothing", "a/b/c", "~/nothing/here"])
def test_a_missing_path_is_not_looked_up_on_the_hub(path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(FileNotFoundError, match=f"{path} is not a directory"):
        local_directory(path)


@pytest.mark.parametrize("repo", ["gpt2", "google-t5/t5-small", "google/t5-v1_1-small"])
def test_a_repository_is_downloaded_without_its_pickles(repo, tmp_path, monkeypatch):
    def snapshot_download(name, allow_patterns):
        files = [
            *("config.json", "model.safetensors", "model-00001-of-00002.safetensors"),
            *("model.safetensors.index.json", "spiece.model", "tokenizer_config.json"),
            *("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "onnx/model.onnx"),
        ]
        kept = huggingface_hub.utils.filter_repo_objects(files, allow_patterns=allow_patterns)
        assert name == repo and list(kept) == files[:6]
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert local_directory(repo) == tmp_path


def test_being_offline_is_one_sentence(tmp_path):
    code = "from lmjax.interop.safetensors import local_directory as d; d('google-t5/t5-small')"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("FileNotFoundError: google-t5/t5-small is no directory here, and")
    assert message.endswith("check the name and the network, or give the path of a directory")
