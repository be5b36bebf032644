"""Prints the peak of a step that torch's own tracker counts, beside `MemoryCount`'s. Configurations
come on stdin.

torch's knows neither several micro-batches nor an optimizer's DTensors, so there is one micro-batch
and no update.
"""

import json
import sys
import warnings

import torch
import torch.distributed as dist
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

from opt_train.config.builder import build
from opt_train.config.run_config import RunConfig
from opt_train.parallel.fsdp import Fsdp2
from opt_train.rehearsal.counting import MemoryCount
from opt_train.rehearsal.rehearse import empty_model, micro_batches, moments_of, rehearsing, spec_of


def peaks(config: RunConfig) -> dict[str, int]:
    spec = spec_of(config)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=config.world_size)
    try:
        with rehearsing() as fake:
            batches = micro_batches(config, spec.layout)
            assert len(batches) == 1
            # The first step is not counted: in it DTensor tries operations on whole tensors, which
            # torch's would see.
            engines = [Fsdp2(empty_model(spec, fake), spec) for _ in range(3)]
            engines[0].forward_backward(batches)
            tracker = FSDPMemTracker(engines[1].model, engines[1].optimizer)
            with tracker:
                engines[1].forward_backward(batches)
            (theirs,) = tracker.get_tracker_snapshot("peak").values()
            memory = MemoryCount()
            memory.count_existing("parameters", engines[2].model.parameters())
            memory.count_existing("optimizer", moments_of(engines[2].model, engines[2].optimizer))
            with memory:
                engines[2].forward_backward(batches)
            return {"torch": theirs["Total"], "ours": memory.peak().bytes}
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for values in json.load(sys.stdin):
        print(json.dumps(peaks(build(RunConfig, values))), flush=True)
