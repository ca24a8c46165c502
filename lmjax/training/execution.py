"""How a model runs on the devices at hand."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax

from lmjax.models.layers import Execution


@dataclasses.dataclass(frozen=True)
class ExecutionOptions:
    """How the model runs. It may change when a run is resumed."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of activations and products; auto: float32 on a CPU, bfloat16 elsewhere. Parameters,
    optimizer, softmax, norms and loss are float32 always. float16 is for DALL-E with
    --gradient-scaling."""
    remat: Literal["none", "matmuls", "full"] = "matmuls"
    """What each layer forgets and computes again backwards: nothing (none), all but the outputs of
    matrix products and of attention (matmuls: much less memory, about as fast), or everything
    (full: least memory, a third slower)."""
    attention: Literal["auto", "whole", "blocked"] = "auto"
    """Attention over the whole batch at once, or one example at a time (blocked), which is two to
    three times as fast on one CPU device; auto picks blocked there and whole elsewhere."""

    def resolve(self, devices: Sequence[jax.Device] | None = None) -> Execution:
        """The choice for `devices`, by default this machine's."""
        devices = jax.devices() if devices is None else devices
        cpu = devices[0].platform == "cpu"
        dtype, attention = self.dtype, self.attention
        if dtype == "auto":
            dtype = "float32" if cpu else "bfloat16"
        if attention == "auto":
            attention = "blocked" if cpu and len(devices) == 1 else "whole"
        return Execution(dtype, self.remat, attention)
