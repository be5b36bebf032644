"""One step on one rank: read, forward, backward, clip, update, and the stats of it."""

import time
from datetime import UTC, datetime

import torch

from opt_train.config.run_config import RunConfig
from opt_train.data.batches import MicroBatch
from opt_train.optim.adamw import put_in_force
from opt_train.optim.clip import clip
from opt_train.optim.in_force import in_force
from opt_train.train.fact_pipe import log_line
from opt_train.train.metrics import memory_bytes
from opt_train.train.probes import Probes
from opt_train.train.readback import Readback
from opt_train.train.state import TrainState, seed_step
from opt_train.train.step_stats import RankStats
from opt_train.train.training import Training


def read_batch(run: Training) -> tuple[list[MicroBatch], float]:
    """This rank's micro-batches of the global batch at the cursor, and the seconds it took to read
    them."""
    began = time.monotonic()
    micro_batches = run.batches.at(
        run.state.cursor,
        data_rank=run.data_rank,
        data_world=run.layout.data_world,
        micro_batch=run.config.train.micro_batch,
    )
    return micro_batches, time.monotonic() - began


def values_of(config: RunConfig, state: TrainState) -> dict[str, float]:
    """What the batch at `state.step` is trained with: LR, betas, eps, decay, clip."""
    return in_force(config, state.ledger, state.step)


def take_step(run: Training, micro_batches: list[MicroBatch], data_seconds: float) -> None:
    """Train on the batch and start to reduce the step's stats. Afterwards `state.step` and the
    cursor are one batch further."""
    state, config = run.state, run.config
    values = values_of(config, state)
    seed_step(config.seed, state.step, run.begin.rank)
    scale = run.loss_scale.scale
    grad_scale = scale * run.predivision
    probes = Probes(
        config.train, state.step + 1, state.step == run.started_step, run.engine, run.device
    )
    probes.time_product()
    with probes.watching_attention(micro_batches):
        sums = run.engine.forward_backward(micro_batches, grad_scale)
    # The ranks of a tensor group have read the same tokens: each counts its part of them.
    tokens = tokens_of(micro_batches) / run.layout.tensor
    weight = torch.tensor(tokens, dtype=torch.float64).to(run.device, non_blocking=True)
    grad_norm = run.engine.grad_norm(weight, grad_scale)
    verdict = clip(grad_norm, values["clip"])
    probes.measure_layers(grad_norm.divisor)
    readback = Readback(
        *sums, verdict.norm, verdict.clipped_norm, verdict.skip, scale, *probes.on_device
    )
    _log(run)
    put_in_force(run.engine.optimizer, values)
    run.wait_copied()
    run.engine.apply(verdict)
    run.loss_scale.update(verdict.skip)
    order_number = run.poll_orders()
    # All of the step is queued by now, so the device works on while the host waits for these.
    own_loss, own_squares, norm, clipped_norm, skip, scale_value, *probed = readback.values()
    own = RankStats(
        loss_sum=own_loss / run.layout.tensor,
        tokens=tokens,
        activation_squares=own_squares / run.layout.tensor,
        grad_norm=norm,
        clipped_norm=clipped_norm,
        loss_scale=scale_value,
        skipping_ranks=int(skip != 0.0),
        stop_votes=int(bool(run.signals.received)),
        saving_ranks=int(run.is_writing),
        order_number=order_number,
        step_seconds=run.clock.lap(),
        data_seconds=data_seconds,
        memory_bytes=memory_bytes(run.device),
        **probes.results(probed),
    )
    run.reducer.start(state.step, own)
    state.step += 1
    state.cursor = run.batches.after(state.cursor)


def tokens_of(micro_batches: list[MicroBatch]) -> float:
    """The weight of the tokens. Weights lie on the host, so counting them there costs the device
    nothing."""
    return sum(
        float(batch.weights.numpy().sum()) * batch.tokens.shape[1] for batch in micro_batches
    )


def _log(run: Training) -> None:
    """One line before the weights move: whoever reads two generations' logs sees whether they ever
    trained at once."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    begin = run.begin
    heard = (
        f"loss {run.newest.loss:.6f} at step {run.newest.step + 1}" if run.newest else "no loss yet"
    )
    log_line(
        f"{now} attempt {begin.attempt} generation {begin.generation} step {run.state.step + 1} "
        f"{heard}"
    )
