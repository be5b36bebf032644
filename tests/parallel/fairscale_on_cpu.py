"""What fairscale takes for granted on a GPU, for tests without one: streams that do nothing, gloo's
reduce-scatter.

The engine itself knows nothing of this.
"""

import contextlib
from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from fairscale.nn.data_parallel import FullyShardedDataParallel

from opt_train.parallel import fairscale_engine


class Stream:
    """Everything that is put on it has been done already."""

    def wait_stream(self, other: "Stream") -> None:
        pass


STREAM = Stream()


def apply() -> None:
    """Let fairscale run on CPU and gloo. Once in a process, before the engine is built; with a GPU,
    nothing."""
    if torch.cuda.is_available():
        return
    replace: Any = setattr
    replace(fairscale_engine, "DEVICES", frozenset(("cpu",)))
    replace(torch.cuda, "current_stream", lambda *_: STREAM)
    replace(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    replace(torch.Tensor, "record_stream", lambda *_: None)

    reset = FullyShardedDataParallel._reset_lazy_init

    def reset_with_streams(self: Any) -> None:
        reset(self)
        self._streams = defaultdict(lambda: STREAM)

    FullyShardedDataParallel._reset_lazy_init = reset_with_streams

    reduce_scatter: Any = vars(dist)["_reduce_scatter_base"]

    def flat_reduce_scatter(output: torch.Tensor, inputs: torch.Tensor, **named: Any) -> None:
        # NCCL takes the pieces stacked; gloo wants them in one row.
        reduce_scatter(output, inputs.reshape(-1), **named)

    replace(dist, "_reduce_scatter_base", flat_reduce_scatter)
