"""One rank of `test_probes.py`: `probe_ranks.py RANK WORLD STORE CASES`; prints one JSON object,
what each case saw.

A case is the JSON list `[name, [replicate, shard, tensor], parallel changes, model changes]`. Every
case trains twice, with probes and without, with the trainer's own parts and its step stats.
"""

import hashlib
import json
import sys
import warnings
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from opt_train.model.config import ModelConfig
from opt_train.optim.adamw import put_in_force
from opt_train.optim.clip import clip, local_part
from opt_train.parallel.config import ParallelConfig, PrecisionConfig
from opt_train.parallel.engine import EngineSpec
from opt_train.parallel.layout import Layout
from opt_train.parallel.make_engine import make_engine
from opt_train.train.config import TrainConfig
from opt_train.train.probes import Probes
from opt_train.train.stats.reducer import StatsReducer
from opt_train.train.stats.step_stats import RankStats, StepStats
from opt_train.train.step import Readback
from tests.parallel.layout_ranks import MODEL, VALUES, share
from tests.train.leave import leave_with

CPU = torch.device("cpu")
STEPS = 3
SCALE = 4.0
PROBED = TrainConfig(layer_norms_every=3, attention_logit_every=3, speed_probe_every=3)
"""Steps 1, which is the first, and 3."""
UNPROBED = TrainConfig(layer_norms_every=0, attention_logit_every=0, speed_probe_every=0)


def probed_of(stats: StepStats) -> dict[str, Any]:
    return {
        "layer_grad_norms": stats.layer_grad_norms,
        "layer_weight_norms": stats.layer_weight_norms,
        "attention_logit_max": stats.attention_logit,
        "attention_logit": stats.sampled_logit,
        "gemm_tflops": stats.gemm_tflops,
    }


def train(
    probed: TrainConfig,
    rank: int,
    layout: Layout,
    parallel: ParallelConfig,
    model: ModelConfig,
    precision: PrecisionConfig,
) -> dict[str, Any]:
    """Losses to the bit, weights to the bit, and what the step stats had of the probes."""
    engine = make_engine(
        EngineSpec(
            model=model,
            precision=precision,
            parallel=parallel,
            layout=layout,
            device=CPU,
            values=VALUES,
            seed=3,
        )
    )
    reducer = StatsReducer(dist.new_group(backend="gloo"), rank, dist.get_world_size())
    losses = []
    scale = torch.tensor(SCALE)
    for step in range(1, STEPS + 1):
        torch.manual_seed(100 * step + rank)
        batches = share(step - 1, layout.data_rank(rank), layout.data_world)
        probes = Probes(probed, step, step == 1, engine, CPU)
        probes.time_product()
        with probes.watching_attention(batches):
            sums = engine.forward_backward(batches, scale)
        tokens = (
            sum(float(batch.weights.sum()) * batch.tokens.shape[1] for batch in batches)
            / layout.tensor
        )
        norm = engine.grad_norm(torch.tensor(tokens, dtype=torch.float64), scale)
        decision = clip(norm, VALUES["clip"])
        probes.measure_layers(norm.divisor)
        loss, grad_norm, *values = Readback(
            sums.loss_sum, decision.norm, *probes.on_device
        ).values()
        losses.append(loss)
        put_in_force(engine.optimizer, VALUES)
        engine.apply(decision)
        own = RankStats(grad_norm=grad_norm, tokens=tokens, **probes.results(values))
        reducer.start(step, own)
    local = [local_part(parameter) for parameter in engine.model.parameters()]
    weights = hashlib.sha256(
        b"".join(part.detach().float().numpy().tobytes() for part in local)
    ).hexdigest()
    collected = reducer.collect(before=STEPS + 1)
    return {
        "trained": {"losses": [repr(loss) for loss in losses], "weights": weights},
        "stats": [{"grad_norm": stats.grad_norm, **probed_of(stats)} for stats in collected],
    }


def main() -> None:
    rank, world, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=120),
    )
    seen = {}
    for name, degrees, ways, changes, precision in json.loads(sys.argv[4]):
        what = (
            rank,
            Layout(*degrees),
            ParallelConfig(**ways),
            replace(MODEL, **changes),
            PrecisionConfig(**{"compute": "fp32"} | precision),
        )
        torch.compiler.reset()
        probed = train(PROBED, *what)
        torch.compiler.reset()
        seen[name] = {**probed, "unprobed": train(UNPROBED, *what)["trained"]}
    leave_with(seen)


if __name__ == "__main__":
    main()
