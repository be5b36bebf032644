"""Reduces the step stats over all ranks, beside training, and reads them one boundary later.

What travels, and why it does so, stands in `opt_train.train.stats.step_stats`.
"""

import json
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from opt_train.protocol.framing import Message, from_payload, to_payload
from opt_train.protocol.orders import Order
from opt_train.train.stats.step_stats import Packed, RankStats, StepStats, pack, unpack


class SplitDecision(RuntimeError):
    """Some ranks applied a step and others skipped it: the copies of the model are no longer
    one."""


class _Reduction(NamedTuple):
    """A step's vector under way."""

    step: int
    own: RankStats
    sums: Tensor
    maxima: Tensor
    works: list[dist.Work]


class StatsReducer:
    """Reduces the stats of each step. Every rank calls the same methods in the same order."""

    def __init__(self, group: dist.ProcessGroup | None, rank: int, world_size: int) -> None:
        """`group` reduces CPU tensors (gloo) and is used for nothing else that runs beside it."""
        self.group = group
        self._rank = rank
        self._world_size = world_size
        self._under_way: deque[_Reduction] = deque()

    def start(self, step: int, own: RankStats) -> None:
        """Begin to reduce the stats of `step`; does not wait."""
        packed = pack(own, self._rank, self._world_size)
        # fp64: it holds every token count and order number exactly.
        sums = torch.tensor(packed.sums, dtype=torch.float64)
        maxima = torch.tensor(packed.maxima, dtype=torch.float64)
        # Up to 64 doubles take about 1 ms on gloo, measured; asynchronous, no step waits for it.
        works = [
            dist.all_reduce(sums, dist.ReduceOp.SUM, group=self.group, async_op=True),
            dist.all_reduce(maxima, dist.ReduceOp.MAX, group=self.group, async_op=True),
        ]
        under_way = [work for work in works if work is not None]
        self._under_way.append(_Reduction(step, own, sums, maxima, under_way))

    def collect(self, before: int) -> list[StepStats]:
        """The stats of all steps below `before` that were not read yet, oldest first; waits for
        them.

        Raises:
            SplitDecision: the ranks did not all do the same.
        """
        collected = []
        while self._under_way and self._under_way[0].step < before:
            reduction = self._under_way.popleft()
            # Begun a whole step ago: by now they are done, unless a rank is late.
            for work in reduction.works:
                work.wait()
            collected.append(self._read(reduction))
        return collected

    def _read(self, reduction: _Reduction) -> StepStats:
        reduced = Packed(reduction.sums.tolist(), reduction.maxima.tolist())
        stats = unpack(reduction.step, reduction.own, self._world_size, reduced)
        # One decision, everywhere (invariant 4). `torch.amp.GradScaler` breaks it under tensor
        # parallelism: it reduces the overflow flag by the first gradient's placements alone.
        if stats.skipping_ranks not in (0, self._world_size):
            raise SplitDecision(
                f"step {stats.step}: {stats.skipping_ranks} of {self._world_size} ranks skipped "
                "the update"
            )
        return stats

    def share_orders(self, orders: Sequence[Order]) -> list[Order]:
        """Rank 0's `orders` on every rank; called by all of them, and only when the stats' order
        number has moved: a broadcast at every step would cost what the stats save."""
        payload = b""
        if self._rank == 0:
            payload = json.dumps([to_payload(order) for order in orders]).encode()
        # The length first, because only rank 0 knows it. JSON and no pickle: orders come from
        # outside.
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
    assert isinstance(message, Order)
    return message
