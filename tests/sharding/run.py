"""A run of `fit` on a mesh of pretended devices, for tests of what survives a change of mesh.

python -m tests.sharding.run WORKDIR STEPS STRATEGY [MESH]     MESH is JSON: {"model": 2}
"""

import json
import sys

import jax

from lmjax.data.batches import host_rows
from lmjax.sharding.strategies import MeshOptions
from lmjax.training.fit import FitOptions, fit
from lmjax.training.step import arrange
from tests.sharding.on_devices import MODELS, ROWS, text_to_text


class Texts:
    """Batch n is a function of n; every process has its rows of it."""

    batch_size = ROWS

    def __init__(self, config):
        self.config = config

    def start(self, position):
        step = 0 if position is None else position["step"]
        own = host_rows(ROWS, jax.process_index(), jax.process_count())
        while True:
            rows = text_to_text(self.config, seed=step)
            yield {name: array[own] for name, array in rows.items()}, {"step": step + 1}
            step += 1


def main(workdir: str, steps: str, strategy: str, mesh: str = "{}") -> None:
    task, optimizer, _ = MODELS["t5"]
    options = MeshOptions(**json.loads(mesh))
    layout = arrange(task, optimizer, ROWS, strategy=strategy, options=options)
    fit(
        task,
        optimizer,
        Texts(task.model.config),
        steps=int(steps),
        workdir=workdir,
        seed=5,
        experiment="sharded",
        identity={"batch": ROWS},
        runtime=FitOptions(log_every=1, eval_every=100, checkpoint_every=100),
        layout=layout,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
