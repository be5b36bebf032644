"""One step on one rank: read, forward, backward, clip, update, and the stats of it."""

import time
from datetime import UTC, datetime

import torch
from torch import Tensor

from opt_train.config.run_config import RunConfig
from opt_train.data.batches import MicroBatch
from opt_train.optim.adamw import put_in_force
from opt_train.optim.clip import clip
from opt_train.optim.in_force import in_force
from opt_train.train.fact_pipe import log_line
from opt_train.train.metrics import memory_bytes
from opt_train.train.probes import Probes
from opt_train.train.state import TrainState, seed_step
from opt_train.train.step_stats import RankStats
from opt_train.train.training import Training


def read_batch(run: Training) -> tuple[list[MicroBatch], float]:
    """This rank's micro-batches of the global batch at the cursor, and the seconds it took to read
    them."""
    context = run.context
    began = time.monotonic()
    micro_batches = run.batches.at(
        context.state.cursor,
        data_rank=context.data_rank,
        data_world=context.layout.data_world,
        micro_batch=context.config.train.micro_batch,
    )
    return micro_batches, time.monotonic() - began


def values_of(config: RunConfig, state: TrainState) -> dict[str, float]:
    """What the batch at `state.step` is trained with: LR, betas, eps, decay, clip."""
    return in_force(config, state.ledger, state.step)


def take_step(run: Training, micro_batches: list[MicroBatch], data_seconds: float) -> None:
    """Train on the batch and start to reduce the step's stats. Afterwards `state.step` and the
    cursor are one batch further.

    The host waits for the device once, in `Readback.values`, when all of the step is queued.
    """
    context, state, engine = run.context, run.state, run.engine
    values = values_of(context.config, state)
    # Dropout by step and rank, not by what was drawn before: a restart draws the same.
    seed_step(context.config.seed, state.step, context.begin.rank)
    loss_scale = context.loss_scale.scale
    grad_scale = loss_scale * context.predivision
    is_first = state.step == run.started_step
    probes = Probes(context.config.train, state.step + 1, is_first, engine, context.device)

    probes.time_product()
    with probes.watching_attention(micro_batches):
        sums = engine.forward_backward(micro_batches, grad_scale)
    # The ranks of a tensor group have read the same tokens: each counts its part of them.
    sharing_ranks = context.layout.tensor
    tokens = tokens_of(micro_batches) / sharing_ranks
    weight = torch.tensor(tokens, dtype=torch.float64).to(context.device, non_blocking=True)
    grad_norm = engine.grad_norm(weight, grad_scale)
    # Multiplying by 0 would not skip: 0 x NaN is NaN. A skipped step leaves everything untouched,
    # to the bit (invariant 5).
    decision = clip(grad_norm, values["clip"])
    probes.measure_layers(grad_norm.divisor)
    readback = Readback(
        *sums,
        decision.norm,
        decision.clipped_norm,
        decision.skip,
        loss_scale,
        *probes.on_device,
    )
    _log(run)
    # Before every step, so that nothing a checkpoint carried can outlive what is in force.
    put_in_force(engine.optimizer, values)
    run.wait_copied()
    engine.apply(decision)
    context.loss_scale.update(decision.skip)
    # As late as can be: an order that comes meanwhile is agreed on a step earlier.
    order_number = run.poll_orders()

    # All of the step is queued by now, so the device works on while the host waits for these.
    own_loss, own_squares, norm, clipped_norm, skip, scale_value, *probed = readback.values()
    own = RankStats(
        loss_sum=own_loss / sharing_ranks,
        tokens=tokens,
        activation_squares=own_squares / sharing_ranks,
        grad_norm=norm,
        clipped_norm=clipped_norm,
        loss_scale=scale_value,
        skipping_ranks=int(skip != 0.0),
        stop_votes=int(bool(run.signals.received)),
        saving_ranks=int(run.checkpoints.is_writing),
        order_number=order_number,
        step_seconds=context.clock.lap(),
        data_seconds=data_seconds,
        memory_bytes=memory_bytes(context.device),
        **probes.results(probed),
    )
    run.reducer.start(state.step, own)
    state.step += 1
    state.cursor = run.batches.after(state.cursor)


class Readback:
    """Copies scalars and small tensors to the host, all in one copy, behind what the device has
    been given to do and without stopping it."""

    def __init__(self, *tensors: Tensor) -> None:
        numbers = torch.cat([tensor.detach().double().flatten() for tensor in tensors])
        self._event: torch.Event | None = None
        if numbers.device.type == "cpu":
            self._values = numbers
            return
        # Pinned: into pageable memory the copy would make the host wait.
        self._values = torch.empty(numbers.shape, dtype=torch.float64, pin_memory=True)
        self._values.copy_(numbers, non_blocking=True)
        self._event = torch.Event(numbers.device)
        self._event.record()

    def values(self) -> list[float]:
        """The numbers, of all tensors in a row, fp64. Waits until the device had them, not for
        what was queued behind."""
        if self._event is not None:
            self._event.synchronize()
        return [float(value) for value in self._values.tolist()]


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
    begin, newest = run.context.begin, run.stats.newest
    loss = "no loss yet"
    if newest is not None:
        loss = f"loss {newest.loss:.6f} at step {newest.step + 1}"
    log_line(
        f"{now} attempt {begin.attempt} generation {begin.generation} "
        f"step {run.state.step + 1} {loss}"
    )
