"""The smallest task with everything `fit` cares about, and a script that trains it.

python -m tests.training.toy WORKDIR STEPS [none | kill-between | kill-saving | terminate]
"""

import os
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.tasks.task import Initial
from lmjax.training.checkpoints import Checkpoints
from lmjax.training.fit import FitOptions, fit
from lmjax.training.optimizers import AdamW
from lmjax.training.schedules import Constant

WIDTH = 8
OPTIONS = FitOptions(log_every=1, eval_every=4, checkpoint_every=4)


class Regression:
    """A two-layer network with dropout on rows with weights; `extra` counts the rows seen."""

    def __init__(self, dropout=0.1, width=WIDTH):
        self.dropout, self.width = dropout, width

    def init(self, rng):
        one, two = jax.random.split(rng)
        params = {
            "hidden": {"kernel": jax.random.normal(one, (WIDTH, self.width)) / WIDTH**0.5},
            "out": {"kernel": jax.random.normal(two, (self.width, 1)) / self.width**0.5},
        }
        axes = {"hidden": {"kernel": ("embed", "mlp")}, "out": {"kernel": ("mlp", None)}}
        return Initial(params, axes, {"rows": jnp.float32(0)}, {"rows": ()})

    def normalizers(self, batch):
        return {"loss": batch["weights"].sum()}

    def loss(self, params, extra, batch, normalizers, rngs, step):
        hidden = jnp.tanh(batch["x"] @ params["hidden"]["kernel"])
        keep = jax.random.bernoulli(rngs["dropout"], 1 - self.dropout, hidden.shape)
        loss, metrics = self._error(params, jnp.where(keep, hidden, 0), batch, normalizers)
        return loss, (metrics, {"rows": extra["rows"] + batch["weights"].sum()})

    def evaluate(self, params, extra, batch, normalizers):
        hidden = jnp.tanh(batch["x"] @ params["hidden"]["kernel"])
        loss, metrics = self._error(params, hidden, batch, normalizers)
        return {"loss": loss, **metrics}, extra

    def _error(self, params, hidden, batch, normalizers):
        error = (hidden @ params["out"]["kernel"])[:, 0] - batch["y"]
        weights = batch["weights"] / normalizers["loss"]
        return (error**2 * weights).sum(), {"absolute": (jnp.abs(error) * weights).sum()}

    def labels(self, params):
        return jax.tree.map(lambda _: "decay", params)

    def flops(self, batch_shapes):
        return 6.0 * batch_shapes["x"][0] * (WIDTH * self.width + self.width)


class Numbers:
    """Batch n is a function of n; `bad` ones hold an infinity; `before[n]()` runs before it."""

    def __init__(self, batch_size=8, bad=(), before=None):
        self.batch_size, self.bad, self.before = batch_size, bad, before or {}

    def batch(self, step):
        rng = np.random.default_rng((7, step))
        x = rng.normal(size=(self.batch_size, WIDTH)).astype(np.float32)
        y = np.sin(x.sum(1)) if step not in self.bad else np.full(self.batch_size, np.inf)
        weights = rng.uniform(size=self.batch_size)
        return {"x": x, "y": y.astype(np.float32), "weights": weights.astype(np.float32)}

    def start(self, position):
        step = 0 if position is None else position["step"]
        while True:
            self.before.get(step, lambda: None)()
            yield self.batch(step), {"step": step + 1}
            step += 1


OPTIMIZER = AdamW(Constant(1e-2))
EVALUATION = [Numbers().batch(10**6 + i) for i in range(2)]


def train(workdir, steps, task=None, data=None, runtime=OPTIONS, **settings):
    return fit(
        task or Regression(),
        OPTIMIZER,
        data or Numbers(),
        steps=steps,
        workdir=workdir,
        seed=3,
        experiment="toy",
        identity={"batch": 8, "model": {"width": WIDTH}},
        runtime=runtime,
        **settings,
    )


def kill(saved=None):
    """Dies without a word, once the checkpoint of step 4 is there if `saved` is a directory."""
    while saved and not (Path(saved) / "checkpoints" / "4").exists():
        pass
    os.kill(os.getpid(), signal.SIGKILL)


def main():
    workdir, steps, fate = sys.argv[1], int(sys.argv[2]), (sys.argv[3:] or ["none"])[0]
    before = {}
    if fate == "kill-between":
        before = {6: lambda: kill(workdir)}  # six steps are done, and four are saved
    if fate == "terminate":
        before = {5: lambda: os.kill(os.getpid(), signal.SIGTERM)}
    if fate == "kill-saving":
        save = Checkpoints.save

        def save_and_die(self, step, *rest):
            save(self, step, *rest)
            if step == 8:
                kill()  # it is being written in the background

        Checkpoints.save = save_and_die
    train(workdir, steps, data=Numbers(before=before))


if __name__ == "__main__":
    main()
