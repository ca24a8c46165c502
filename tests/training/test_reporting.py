import json

import numpy as np
import pytest
from PIL import Image

from lmjax.data.batches import assemble
from lmjax.models import gpt2
from lmjax.models.layers import Execution
from lmjax.tasks.causal import Causal
from lmjax.tasks.task import reads
from lmjax.training import reporting
from lmjax.training.fit import FitOptions
from lmjax.training.reporting import Reporter, count_tokens, parameter_summary, read_metrics
from tests.training import toy


def test_the_last_step_is_recorded_whatever_log_every_is(tmp_path, capsys):
    toy.train(tmp_path, 3, runtime=FitOptions(log_every=1000), evaluation=toy.EVALUATION)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records] == [0, 3, 3]
    assert {"loss", "grad_norm", "learning_rate", "step_seconds"} <= records[1].keys()
    assert records[2].keys() == {"step", "eval_loss", "eval_absolute"}
    assert Image.open(tmp_path / "loss.png").verify() is None
    assert list((tmp_path / "tensorboard").glob("events*"))

    out = capsys.readouterr().out
    assert "step 3/3: loss" in out and "held-out data: loss" in out
    assert "parameters              72" in out and "optimizer 580 B" in out
    assert "\x1b" not in out  # no cursor tricks where there is no terminal


def test_records_after_the_restored_step_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(6)]
    path.write_text("\n".join(lines) + '\n{"step": 6, "lo')  # cut off in the middle of a line
    with Reporter(tmp_path, first_step=3, steps=9) as reporter:
        reporter.begin()
        reporter.stepped(4, 0)
        reporter.log(4, {"loss": 2.0})
    records = read_metrics(path)
    assert [(r["step"], r["loss"]) for r in records[-2:]] == [(3, 1.0), (4, 2.0)]

    with Reporter(tmp_path, first_step=0, steps=9):
        pass
    assert read_metrics(path) == []


def test_speed_and_utilisation(tmp_path, monkeypatch):
    now = iter(range(100))  # every look at the clock is a second later
    monkeypatch.setattr(reporting.time, "perf_counter", lambda: float(next(now)))
    with Reporter(tmp_path, 0, 9, flops=50.0, peak=100.0) as reporter:
        reporter.begin()
        reporter.stepped(1, tokens=300)
        reporter.stepped(2, tokens=100)
        with reporter.speed.stopped():  # a second has passed; what happens here does not count
            reporting.time.perf_counter()
        reporter.log(2, {"loss": float("nan")})
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert record == {
        "step": 2, "loss": None, "step_seconds": 1.0, "tokens_per_second": 200.0, "mfu": 0.5
    }  # fmt: skip


def test_padding_is_not_counted():
    rows = {
        "inputs": np.ones((2, 4), np.int32),
        "inputs_segment_ids": np.array([[1, 1, 2, 0], [1, 0, 0, 0]]),
        "targets_segment_ids": np.array([[1, 2], [0, 0]]),
    }
    assert count_tokens(rows, ("inputs", "targets")) == 6
    assert count_tokens(rows, ("inputs",)) == 4
    assert count_tokens({"pictures": np.ones((2, 4))}, ()) == 0
    stream = {"image_tokens": np.zeros((2, 9)), "captions_lengths": np.array([3, 1])}
    stream["captions"] = np.ones((2, 5))
    assert count_tokens(stream, ("captions", "image_tokens")) == 22


def test_what_is_only_predicted_is_not_counted():
    config = gpt2.GPT2Config(vocab=9, positions=8, layers=1, width=4, heads=1, feed_forward=8)
    rows = assemble(
        [[dict.fromkeys(("inputs", "targets"), np.arange(5))]],
        dict.fromkeys(("inputs", "targets"), 8),
    )
    assert count_tokens(rows, reads(Causal(gpt2.GPT2(config, Execution())))) == 5


def test_parameters_by_module():
    params = {"encoder": {"a": np.zeros((10, 3)), "b": np.zeros(10)}, "decoder": np.zeros(60)}
    lines = [line.split() for line in parameter_summary(params).splitlines()]
    assert lines == [["parameters", "100"], ["decoder", "60", "60.0%"], ["encoder", "40", "40.0%"]]


@pytest.mark.parametrize(("count", "text"), [(288, "288 B"), (1.5e6, "1.5 MB"), (44e9, "44 GB")])
def test_sizes(count, text):
    assert reporting.size(count) == text
