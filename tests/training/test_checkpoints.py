import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.training import checkpoints
from lmjax.training.checkpoints import (
    CheckpointError,
    Checkpoints,
    claim_workdir,
    latest_step,
    lock_workdir,
    read_config,
    restore_params,
)
from lmjax.training.state import TrainState
from tests.training import toy


def state(step, width=4):
    params = {"decoder": {"kernel": jnp.full((3, width), step), "bias": jnp.zeros(width)}}
    return TrainState(jnp.int32(step), params, {}, (jnp.ones(3), ()), None, jax.random.key(1))


def target(width=4):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), state(0, width)
    )


def run_with(workdir, steps, identity=None):
    """A run's directory with small checkpoints of these steps."""
    claim_workdir(workdir, "toy", identity or {}, {})
    saver = Checkpoints(workdir, keep=9)
    for step in steps:
        saver.save(step, state(step), {"position": {"step": step}})
    saver.close()
    return workdir


def damage(workdir, step):
    for file in (Path(workdir) / "checkpoints" / str(step) / "params").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:-20])


def contents(directory):
    return {p: p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_the_newest_and_the_best_are_kept(tmp_path):
    saver = Checkpoints(tmp_path, keep=2)
    for step, loss in enumerate([3.0, 1.0, float("nan"), 2.0, 4.0], 1):
        saver.save(step, state(step), {}, {"eval_loss": loss})
    saver.save(6, state(6), {})
    saver.wait()
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [2, 5, 6]
    saver.close()


def test_state_position_and_keys_come_back(tmp_path):
    run_with(tmp_path, [5, 7])
    saver = Checkpoints(tmp_path)
    restored = saver.restore(target(), 7)
    assert saver.inspect(target(), 7) == {"position": {"step": 7}}
    assert (jax.random.key_data(restored.rng) == jax.random.key_data(state(7).rng)).all()
    jax.tree.map(
        np.testing.assert_array_equal, restored._replace(rng=None), state(7)._replace(rng=None)
    )


def test_another_identity_is_refused_field_by_field(tmp_path):
    model = {"layers": 6, "width": 8}
    identity = {"batch": 128, "model": model, "optimizer": toy.OPTIMIZER, "averaging": None}
    run_with(tmp_path, [1], identity)
    before = contents(tmp_path)
    other = {**identity, "batch": 64, "model": {"layers": 6}, "averaging": {"decay": 0.5}}
    with pytest.raises(CheckpointError) as error:
        claim_workdir(tmp_path, "toy", other, {"steps": 10})
    changes = 'batch 128 -> 64, model.width 8 -> absent, averaging null -> {"decay": 0.5})'
    assert changes in str(error.value)
    assert "layers" not in str(error.value)
    assert contents(tmp_path) == before

    claim_workdir(tmp_path, "toy", identity, {"steps": 20})  # runtime settings may change
    assert read_config(tmp_path)["runtime"] == {"steps": 20}
    assert read_config(tmp_path)["identity"]["optimizer"]["type"] == "AdamW"


def test_a_field_that_an_older_version_did_not_know_is_no_difference(tmp_path, capsys):
    run_with(tmp_path, [1], {"model": {"layers": 6}})
    newer = {"model": {"layers": 6, "heads": 2}}
    for _ in range(2):
        claim_workdir(tmp_path, "toy", newer, {})
    assert capsys.readouterr().out.count("of a version without model.heads = 2") == 1
    with pytest.raises(CheckpointError, match="model.heads 2 -> 3"):
        claim_workdir(tmp_path, "toy", {"model": {"layers": 6, "heads": 3}}, {})


def test_a_workdir_is_for_one_process_at_a_time(tmp_path):
    with lock_workdir(tmp_path / "run"):
        with pytest.raises(CheckpointError, match="another process is training in .*run"):
            toy.train(tmp_path / "run", 1)
        assert not (tmp_path / "run" / "config.json").exists()
    with lock_workdir(tmp_path / "run"):
        pass


def test_files_that_belong_to_a_run_are_written_with_its_config(tmp_path):
    for _ in range(2):  # begun, and resumed
        claim_workdir(tmp_path, "toy", {}, {}, {"tokenizer.model": b"pieces"})
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "tokenizer.model"}
    assert (tmp_path / "tokenizer.model").read_bytes() == b"pieces"


def test_a_directory_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("...")
    for take in (lambda: claim_workdir(tmp_path, "toy", {}, {}), lambda: toy.train(tmp_path, 1)):
        with pytest.raises(CheckpointError, match="not the workdir of a run"):
            take()
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    for read in (latest_step, restore_params):
        with pytest.raises(CheckpointError, match="not the workdir of a run"):
            read(tmp_path)


def test_a_run_without_checkpoints(tmp_path):
    claim_workdir(tmp_path, "toy", {}, {})
    with pytest.raises(CheckpointError, match="has saved no checkpoint yet"):
        restore_params(tmp_path)


def test_a_damaged_checkpoint_is_named_and_the_last_good_one_is_not_touched(tmp_path):
    run_with(tmp_path, [1, 2, 3])
    damage(tmp_path, 2)
    damage(tmp_path, 3)
    before = contents(tmp_path)
    saver = Checkpoints(tmp_path)
    with pytest.raises(CheckpointError) as error:
        saver.restore(target(), 3)
    broken = tmp_path / "checkpoints" / "3"
    assert "step 3" in str(error.value) and "is damaged" in str(error.value)
    assert f"the last good one is step 1; remove {broken}" in str(error.value)
    assert contents(tmp_path) == before
    with pytest.raises(CheckpointError, match=r"damaged .*choose another step \(\[1, 2\]\)"):
        restore_params(tmp_path)

    shutil.rmtree(broken)
    shutil.rmtree(broken.with_name("2"))
    assert latest_step(tmp_path) == 1
    assert restore_params(tmp_path)["decoder"]["kernel"][0, 0] == 1


def flip(file, bit):
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


@pytest.mark.parametrize("item", ["params", "training"])
def test_a_flipped_bit_of_an_array_is_noticed(tmp_path, item):
    """Zarr and zstd keep no checksum of what they could not compress, as weights are."""
    noise = jax.random.normal(jax.random.key(2), (200, 200))
    noisy = state(0)._replace(params={"kernel": noise}, opt_state=(noise, ()))
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), noisy
    )
    claim_workdir(tmp_path, "toy", {}, {})
    with Checkpoints(tmp_path, keep=9) as saver:
        for step in (1, 2):
            saver.save(step, noisy, {})
    files = (tmp_path / "checkpoints" / "2" / item).rglob("d/*")
    flip(max(files, key=lambda path: path.stat().st_size), 8 * 100_000 + 3)
    saver = Checkpoints(tmp_path, keep=9)
    said = f"damaged .*numbers in {item}.*last good one is step 1"
    with pytest.raises(CheckpointError, match=said):
        saver.restore(shapes, 2)
    np.testing.assert_array_equal(saver.restore(shapes, 1).params["kernel"], noise)
    saver.close()
    if item == "params":
        with pytest.raises(CheckpointError, match="damaged"):
            restore_params(tmp_path, step=2)
    host = restore_params(tmp_path, {"kernel": np.zeros_like(noise)}, step=1)
    np.testing.assert_array_equal(host["kernel"], noise)


def test_a_checkpoint_of_another_model_is_told_by_its_shapes(tmp_path):
    run_with(tmp_path, [1])
    expected = (
        r"of another model: decoder.bias is \[4\] there and \[5\] here,"
        r" decoder.kernel is \[3, 4\] there and \[3, 5\] here"
    )
    with pytest.raises(CheckpointError, match=expected):
        Checkpoints(tmp_path).restore(target(width=5), 1)
    with pytest.raises(CheckpointError, match=expected):
        restore_params(tmp_path, target(width=5).params)


def test_no_space_left(tmp_path, monkeypatch):
    run_with(tmp_path, [1])
    before = contents(tmp_path)
    saver = Checkpoints(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
        with pytest.raises(CheckpointError, match="no space for a checkpoint .* make room"):
            saver.save(2, state(2), {})

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saver._manager, "save", full)
    with pytest.raises(CheckpointError, match="no space is left.* that of step 1 is unharmed"):
        saver.save(2, state(2), {})
    assert contents(tmp_path) == before


def test_a_write_that_fails_in_the_background_is_told_at_the_end(tmp_path, monkeypatch, capsys):
    run_with(tmp_path, [1])
    saver = Checkpoints(tmp_path)

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saver._manager, "wait_until_finished", full)  # closing waits
    with pytest.raises(CheckpointError, match="no space is left.* that of step 1 is unharmed"):
        with saver:
            pass
    with pytest.raises(KeyboardInterrupt), saver:
        raise KeyboardInterrupt
    assert "warning: no space is left" in capsys.readouterr().err


def test_files_are_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "config.json"
    checkpoints.write_atomically(file, b"old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints.os, "fsync", full)
    with pytest.raises(CheckpointError, match="no space is left: .*config.json.* make room and"):
        checkpoints.write_atomically(file, b"new")
    assert contents(tmp_path) == {file: b"old"}


def test_a_damaged_config_is_not_mistaken_for_a_new_run(tmp_path):
    claim_workdir(tmp_path, "toy", {}, {})
    (tmp_path / "config.json").write_text(json.dumps({"experiment": "toy"}))
    with pytest.raises(CheckpointError, match="config.json is damaged"):
        claim_workdir(tmp_path, "toy", {}, {})
