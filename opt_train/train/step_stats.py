"""The step's word: one small vector that all ranks reduce once a step, so that all of them know and
decide the same.

It travels on a CPU group of its own, starts after a step's backward and is read at the boundary one
step later, so it costs the step nothing. What it says is a function of the reduction alone, hence
identical on every rank.
"""

import json
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from opt_train.protocol.framing import Message, from_payload, to_payload
from opt_train.protocol.orders import Order, Save, SaveAndStop
from opt_train.train.probe_results import RankProbes, WorldProbes


@dataclass(frozen=True, kw_only=True, slots=True)
class RankStats:
    """What one rank puts into the word of a step."""

    loss_sum: float = 0.0
    """Nats, over the rank's tokens; ranks that read the same ones share sums and tokens out."""
    tokens: float = 0.0
    activation_squares: float = 0.0
    """Sum over the rank's tokens of the squared L2 norm of the last layer's output."""
    grad_norm: float = 0.0
    clipped_norm: float = 0.0
    loss_scale: float = 1.0
    """What the step was taken with."""
    skipped: bool = False
    """This rank's device skipped the update."""
    wants_to_stop: bool = False
    """It saw SIGTERM, SIGUSR1 or, alone, SIGINT."""
    saves: bool = False
    """It still writes the checkpoint that was begun last."""
    step_seconds: float = 0.0
    data_seconds: float = 0.0
    memory_bytes: int = 0
    probed: RankProbes = field(default_factory=RankProbes)
    """What some steps measure; on every rank the same kinds of numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepStats:
    """What the world says of `step`: the same on every rank."""

    step: int
    loss: float
    """Nats a token."""
    tokens: int
    activation_norm: float
    """Root mean square over tokens of the L2 norm of the last layer's output."""
    grad_norm: float
    clipped_norm: float
    loss_scale: float
    """What the step was taken with; 1 where gradients are not scaled."""
    skipped: bool
    """The update was not applied, on any rank."""
    stop_votes: int
    saving_ranks: int
    """Those that still wrote the checkpoint that was begun last."""
    order_number: int
    """The newest order that rank 0 had heard of."""
    step_seconds: float
    """The slowest rank's, like the two below."""
    data_seconds: float
    memory_bytes: int
    probed: WorldProbes = field(default_factory=WorldProbes)

    @property
    def overflow(self) -> bool:
        """The gradient was not finite."""
        return not math.isfinite(self.grad_norm)

    @property
    def verdict(self) -> str:
        """``apply``, ``skip``, or ``stop`` (which says nothing about the update)."""
        if self.stop_votes:
            return "stop"
        return "skip" if self.skipped else "apply"


class SplitDecision(RuntimeError):
    """Some ranks applied a step and others skipped it: the copies of the model are no longer
    one."""


class StatsReducer:
    """Starts a word each step and reads it later. Every rank calls the same methods in the same
    order."""

    def __init__(self, group: dist.ProcessGroup | None, rank: int, world_size: int) -> None:
        """`group` reduces CPU tensors (gloo) and is used for nothing else that runs beside it."""
        self.group = group
        self._rank = rank
        self._world_size = world_size
        self._under_way: deque[tuple[int, RankProbes, Tensor, Tensor, list[dist.Work]]] = deque()

    def start(self, step: int, own: RankStats, order_number: int) -> None:
        """Begin to reduce the word of `step`; does not wait. Only rank 0's `order_number`, norms
        and scale count."""
        first = self._rank == 0
        # A sum carries a NaN from any rank to all of them, which a maximum does not promise.
        sums = [own.loss_sum, own.tokens, own.activation_squares]
        sums += [float(flag) for flag in (own.skipped, own.wants_to_stop, own.saves)]
        of_first = [own.grad_norm, own.clipped_norm, own.loss_scale, float(order_number)]
        sums += of_first if first else [0.0] * len(of_first)
        sums += own.probed.sums(self._rank, self._world_size)
        maxima = [own.step_seconds, own.data_seconds, own.memory_bytes, *own.probed.maxima()]
        summed, largest = (
            torch.tensor(sums, dtype=torch.float64),
            torch.tensor(maxima, dtype=torch.float64),
        )
        works = [
            dist.all_reduce(summed, dist.ReduceOp.SUM, group=self.group, async_op=True),
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group, async_op=True),
        ]
        self._under_way.append(
            (step, own.probed, summed, largest, [work for work in works if work is not None])
        )

    def heard(self, before: int) -> list[StepStats]:
        """The words of all steps below `before` that were not read yet, oldest first; waits for
        them.

        Raises:
            SplitDecision: the ranks did not all do the same.
        """
        words = []
        while self._under_way and self._under_way[0][0] < before:
            step, probed, summed, largest, works = self._under_way.popleft()
            for work in works:
                work.wait()
            words.append(self._read(step, probed, summed.tolist(), largest.tolist()))
        return words

    def _read(
        self, step: int, probed: RankProbes, summed: Sequence[float], largest: Sequence[float]
    ) -> StepStats:
        loss_sum, tokens, squares, skipped, votes, saving, *others = summed
        grad_norm, clipped_norm, loss_scale, order_number, *rest = others
        if skipped not in (0.0, float(self._world_size)):
            raise SplitDecision(
                f"step {step}: {int(skipped)} of {self._world_size} ranks skipped the update"
            )
        return StepStats(
            step=step,
            loss=loss_sum / tokens if tokens else math.nan,
            tokens=round(tokens),
            activation_norm=math.sqrt(squares / tokens) if tokens and squares >= 0 else math.nan,
            grad_norm=grad_norm,
            clipped_norm=clipped_norm,
            loss_scale=loss_scale,
            skipped=skipped > 0,
            stop_votes=int(votes),
            saving_ranks=int(saving),
            order_number=int(order_number),
            step_seconds=largest[0],
            data_seconds=largest[1],
            memory_bytes=int(largest[2]),
            probed=probed.of_world(rest, largest[3:]),
        )

    def share_orders(self, orders: Sequence[Order]) -> list[Order]:
        """Rank 0's `orders` on every rank; called by all of them, and only when a word's order
        number has moved."""
        payload = (
            json.dumps([to_payload(order) for order in orders]).encode() if self._rank == 0 else b""
        )
        size = torch.tensor([len(payload)], dtype=torch.int64)
        dist.broadcast(size, src=0, group=self.group)
        body = torch.zeros(int(size.item()), dtype=torch.uint8)
        if self._rank == 0:
            body = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        dist.broadcast(body, src=0, group=self.group)
        return [_order(from_payload(item)) for item in json.loads(bytes(body.tolist()))]

    def sum(self, *values: float) -> list[float]:
        """The sums of `values` over the world; waits."""
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.group)
        return [float(value) for value in total.tolist()]


def _order(message: Message) -> Order:
    assert isinstance(message, (Save, SaveAndStop))
    return message


class Readback:
    """Numbers of the device on their way to the host, copied without stopping the device."""

    def __init__(self, *tensors: Tensor) -> None:
        together = torch.cat([tensor.detach().double().flatten() for tensor in tensors])
        self._event: torch.Event | None = None
        if together.device.type != "cpu":
            self._values = torch.empty(together.shape, dtype=torch.float64, pin_memory=True)
            self._values.copy_(together, non_blocking=True)
            self._event = torch.Event(together.device)
            self._event.record()
        else:
            self._values = together

    def values(self) -> list[float]:
        """The numbers, of all tensors in a row. Waits until the device had them, not for what was
        queued behind."""
        if self._event is not None:
            self._event.synchronize()
        return [float(value) for value in self._values.tolist()]
