"""One step on one rank: read, forward, backward, clip, update, and the word about it."""

import time
from datetime import UTC, datetime

import torch
from torch import Tensor

from opt_train.data.batches import MicroBatch
from opt_train.model.decoder import OPT, Loss
from opt_train.optim.adamw import apply, put_in_force
from opt_train.optim.clip import average_and_clip
from opt_train.optim.in_force import in_force
from opt_train.parallel.fsdp import sync_gradients
from opt_train.train.metrics import memory_bytes
from opt_train.train.state import seed_step
from opt_train.train.telling import log_line
from opt_train.train.training import Training
from opt_train.train.word import Own, Readback


def read_batch(run: Training) -> tuple[list[MicroBatch], float]:
    """This rank's micro-batches of the global batch at the cursor, and the seconds it took to read them."""
    began = time.monotonic()
    micro_batches = run.batches.at(
        run.state.cursor,
        data_rank=run.data_rank,
        data_world=run.layout.data_world,
        micro_batch=run.config.train.micro_batch,
    )
    return micro_batches, time.monotonic() - began


def take_step(run: Training, micro_batches: list[MicroBatch], data_seconds: float) -> None:
    """Train on the batch and start the step's word. Afterwards `state.step` and the cursor are one batch further."""
    state, config = run.state, run.config
    values = in_force(config, (), state.step)
    seed_step(config.seed, state.step, run.begin.rank)
    scale = run.loss_scale.scale
    grad_scale = scale * run.predivision
    loss_sum, activation_squares = forward_backward(run.model, micro_batches, run.device, grad_scale)
    # The ranks of a tensor group have read the same tokens: each counts its part of them.
    tokens = tokens_of(micro_batches) / run.layout.tensor
    clipped = average_and_clip(
        run.model.parameters(),
        torch.tensor(tokens, dtype=torch.float64).to(run.device, non_blocking=True),
        values["clip"],
        grad_scale,
    )
    readback = Readback(loss_sum, activation_squares, clipped.norm, clipped.clipped_norm, clipped.skip, scale)
    _log(run)
    put_in_force(run.optimizer, values)
    apply(run.optimizer, clipped.skip, clipped.factor)
    run.loss_scale.update(clipped.skip)
    order_number = run.poll_orders()
    # All of the step is queued by now, so the device works on while the host waits for these.
    own_loss, own_squares, norm, clipped_norm, skip, scale_value = readback.values()
    own = Own(
        loss_sum=own_loss / run.layout.tensor,
        tokens=tokens,
        activation_squares=own_squares / run.layout.tensor,
        grad_norm=norm,
        clipped_norm=clipped_norm,
        loss_scale=scale_value,
        skipped=skip != 0.0,
        wants_to_stop=bool(run.signals.received),
        step_seconds=run.clock.lap(),
        data_seconds=data_seconds,
        memory_bytes=memory_bytes(run.device),
    )
    run.agreement.start(state.step, own, order_number)
    state.step += 1
    state.cursor = run.batches.after(state.cursor)


def tokens_of(micro_batches: list[MicroBatch]) -> float:
    """The weight of the tokens. Weights lie on the host, so counting them there costs the device nothing."""
    return sum(float(batch.weights.numpy().sum()) * batch.tokens.shape[1] for batch in micro_batches)


def forward_backward(
    model: OPT, micro_batches: list[MicroBatch], device: torch.device, grad_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Leave the gradients, summed over tokens and ranks, in the parameters.

    Args:
        grad_scale: fp32 scalar that the gradients are multiplied by; None: 1.

    Returns:
        This rank's sums of loss (nats) and of squared activation norms, scalars on the device.
    """
    loss_sum = torch.zeros((), dtype=torch.float32, device=device)
    activation_squares = torch.zeros((), dtype=torch.float32, device=device)
    for number, batch in enumerate(micro_batches, start=1):
        sync_gradients(model, now=number == len(micro_batches))
        loss = model(
            batch.tokens.to(device, non_blocking=True),
            batch.targets.to(device, non_blocking=True),
            batch.weights.to(device, non_blocking=True),
            grad_scale,
        )
        assert isinstance(loss, Loss)
        # torch's stubs leave backward untyped.
        loss.loss_sum.backward()  # type: ignore[no-untyped-call]
        loss_sum += loss.loss_sum.detach()
        activation_squares += loss.activation_squares
    return loss_sum, activation_squares


def _log(run: Training) -> None:
    """One line before the weights move: whoever reads two generations' logs sees whether they ever trained at once."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    begin = run.begin
    heard = f"loss {run.newest.loss:.6f} at step {run.newest.step + 1}" if run.newest else "no loss yet"
    log_line(f"{now} attempt {begin.attempt} generation {begin.generation} step {run.state.step + 1} {heard}")
