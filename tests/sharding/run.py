"""A run of `fit` on a mesh of pretended devices, for tests of what survives a change of mesh.

python -m tests.sharding.run WORKDIR STEPS STRATEGY [MESH [DISTRIBUTED [FATE]]]

MESH and DISTRIBUTED are JSON: {"model": 2} {"coordinator": "127.0.0.1:1", "processes": 2, ...}.
FATE: "stop" sends this process SIGTERM before step 3; "other" trains another model size;
"elsewhere" has a disk of its own; "compressed" compresses gradients.
"""

import json
import os
import signal
import sys

from lmjax import command_line
from lmjax.data.batches import host_rows
from lmjax.sharding import multihost
from lmjax.sharding.multihost import Distributed
from lmjax.sharding.strategies import MeshOptions
from lmjax.training.compression import PowerSGD
from lmjax.training.fit import FitOptions, fit
from lmjax.training.step import arrange
from tests.sharding.on_devices import MODELS, ROWS, text_to_text


class Texts:
    """Batch n is a function of n; every process has its share of it. `before` runs at batch 3."""

    batch_size = ROWS

    def __init__(self, config, share, before):
        self.config, self.share, self.before = config, share, before

    def start(self, position):
        step = 0 if position is None else position["step"]
        own = host_rows(ROWS, *self.share)
        while True:
            if step == 2:
                self.before()
            rows = text_to_text(self.config, seed=step)
            yield {name: array[own] for name, array in rows.items()}, {"step": step + 1}
            step += 1


def main(workdir, steps, strategy, mesh="{}", distributed="{}", fate="") -> None:
    print(multihost.start(Distributed(**json.loads(distributed))))
    task, optimizer, _ = MODELS["t5"]
    options = MeshOptions(**json.loads(mesh))
    layout = arrange(task, optimizer, ROWS, strategy=strategy, options=options)
    stop = (lambda: os.kill(os.getpid(), signal.SIGTERM)) if fate == "stop" else (lambda: None)
    fit(
        task,
        optimizer,
        Texts(task.model.config, layout.share, stop),
        steps=int(steps),
        workdir=f"{workdir}-elsewhere" if fate == "elsewhere" else workdir,
        seed=5,
        experiment="sharded",
        identity={"model": {"width": 256 if fate == "other" else 128}},
        runtime=FitOptions(log_every=1, eval_every=100, checkpoint_every=100),
        layout=layout,
        compression=PowerSGD(4) if fate == "compressed" else None,
    )


if __name__ == "__main__":
    command_line.run(lambda: main(*sys.argv[1:]))
