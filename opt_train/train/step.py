"""One step on one rank: read, forward, backward, clip, update, and the stats of it."""

import time
from datetime import UTC, datetime

import torch
from torch import Tensor

from opt_train.data.batches import MicroBatch
from opt_train.data.checked_batches import check_micro_batches, outside_of
from opt_train.optim.adamw import put_in_force
from opt_train.optim.clip import clip, multiply
from opt_train.train.fact_pipe import log_line
from opt_train.train.probes import Probes
from opt_train.train.resume import CannotStart
from opt_train.train.state import cursor_of, seed_step, values_of
from opt_train.train.stats.metrics import memory_bytes
from opt_train.train.stats.step_stats import RankStats
from opt_train.train.training import Training


def read_batch(run: Training) -> tuple[list[MicroBatch], float]:
    """This rank's micro-batches of the global batch at the cursor, and the seconds it took to read
    them."""
    context, state = run.context, run.state
    began = time.monotonic()
    # An order may have moved it.
    state.cursor = cursor_of(context.config, state)
    micro_batches = run.batches.at(
        state.cursor,
        data_rank=context.data_rank,
        data_world=context.layout.data_world,
        micro_batch=context.config.train.micro_batch,
    )
    vocab_size = context.config.model.vocab_size
    # On a GPU the device itself would fail, long after, and say nothing of the data.
    if outside := outside_of(micro_batches, vocab_size):
        raise CannotStart(
            "data",
            f"the batch at position {state.cursor.samples} of the order of the data has {outside} "
            f"tokens outside of model.vocab_size={vocab_size}: its shards are damaged; `opt-train "
            "prepare` verifies them",
        )
    return micro_batches, time.monotonic() - began


def take_step(run: Training, micro_batches: list[MicroBatch], data_seconds: float) -> None:
    """Train on the batch and start to reduce the step's stats. Afterwards `state.step` and the
    cursor are one batch further.

    The host waits for the device once, in `Readback.values`, when all of the step is queued.
    """
    context, state, engine = run.context, run.state, run.engine
    values = values_of(context.config, state)
    # Dropout by step and rank, not by what was drawn before: a restart draws the same.
    seed_step(context.config.seed, state.step, context.begin.rank, context.device)
    context.loss_scale.put_in_force(values)
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
    # Not at every step: to look for them costs the host time.
    if (factor := values["embedding_gradient"]) != 1.0:
        multiply(engine.embedding_gradients(), factor)
    # As the gradients were summed: over the world, ranks of a tensor group sharing theirs out.
    grad_norm = engine.grad_norm(weight, grad_scale, sums.loss_sum.double() / sharing_ranks)
    refused = context.guard.refuses(grad_norm.norm, grad_norm.loss)
    # Multiplying by 0 would not skip: 0 x NaN is NaN. A skipped step leaves everything untouched,
    # to the bit (invariant 5).
    decision = clip(grad_norm, values["clip"], refused)
    probes.measure_layers(grad_norm.divisor)
    moved = run.update_ratio.measure()
    of_embedding = grad_norm.embedding_squares
    readback = Readback(
        *sums,
        decision.norm,
        decision.clipped_norm,
        decision.skip,
        grad_norm.loss,
        loss_scale,
        *(moved or ()),
        *(() if of_embedding is None else (of_embedding,)),
        *probes.on_device,
    )
    _log(run)
    # Before every step, so that nothing a checkpoint carried can outlive what is in force.
    put_in_force(engine.optimizer, values)
    run.wait_copied()
    engine.apply(decision)
    context.loss_scale.update(decision.overflow)
    # As late as can be: an order that comes meanwhile is agreed on a step earlier.
    order_number = run.poll_orders()

    # All of the step is queued by now, so the device works on while the host looks at the batch
    # and waits for these.
    checks = check_micro_batches(micro_batches)
    repeats = run.repeats.count(state.cursor.samples, checks.hashes)
    (own_loss, own_squares, norm, clipped_norm, skip, mean_loss, scale_value, *probed) = (
        readback.values()
    )
    squares: list[float | None] = [None, None]
    if moved is not None:
        squares, probed = [*probed[:2]], probed[2:]
    embedding_squares = None if of_embedding is None else probed.pop(0)
    again = run.replays.compare(
        state.step, state.cursor.samples, values, (own_loss, own_squares, scale_value)
    )
    own = RankStats(
        loss_sum=own_loss / sharing_ranks,
        tokens=tokens,
        activation_squares=own_squares / sharing_ranks,
        grad_norm=norm,
        clipped_norm=clipped_norm,
        mean_loss=mean_loss,
        loss_scale=scale_value,
        update_squares=squares[0],
        sampled_squares=squares[1],
        embedding_squares=embedding_squares,
        skipping_ranks=int(skip != 0.0),
        stop_votes=int(bool(run.signals.received)),
        saving_ranks=int(run.checkpoints.is_writing),
        order_number=order_number,
        step_seconds=context.clock.lap(),
        data_seconds=data_seconds,
        memory_bytes=memory_bytes(context.device),
        sequences=checks.sequences / sharing_ranks,
        token_entropies=checks.token_entropy * checks.sequences / sharing_ranks,
        equal_labels=checks.equal_labels / sharing_ranks,
        duplicates=checks.duplicates / sharing_ranks,
        repeats=repeats / sharing_ranks,
        comparing_ranks=int(again is not None),
        differing_ranks=int(again is False),
        differing_rank=context.begin.rank if again is False else -1,
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
