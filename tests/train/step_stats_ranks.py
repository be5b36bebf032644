"""The step stats and the orders without a model, for as many steps as the last argument says. Run
by test_04; prints what the rank recorded."""

import os
import random
import signal
import sys
import time

import torch
import torch.distributed as dist

from opt_train.optim.clip import clip, global_norm
from opt_train.protocol.framing import to_line
from opt_train.train.orders import ControlPipe, StopSignals
from opt_train.train.stats.reducer import StatsReducer
from opt_train.train.stats.step_stats import RankStats, StepStats
from tests.train.leave import leave_with
from tests.train.lr_factor import LrFactor

ORDERS = 40


def outcome_of(stats: StepStats) -> str:
    if stats.stop_votes:
        return "stop"
    return "skip" if stats.skipped else "apply"


def main(rank: int, world_size: int, store: str, steps: int) -> None:
    stop = steps - 100
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size
    )
    reducer = StatsReducer(dist.new_group(backend="gloo"), rank, world_size)
    read_end, write_end = os.pipe()
    control, signals = ControlPipe(read_end), StopSignals()
    signals.listen()
    # What the agent does, on rank 0: an order in the middle of a step, now and then two.
    moments = sorted(random.Random(4).choices(range(stop - 10), k=ORDERS)) if rank == 0 else []

    chance = random.Random(rank)
    poisoned = set(random.Random(7).sample(range(steps), 60)) if rank == 2 else set()
    parameter = torch.nn.Parameter(torch.zeros(4))
    obeyed, newest, inbox, record = 0, 0, [], []
    for step in range(steps):
        for stats in reducer.collect(before=step - 1):
            newest = max(newest, stats.order_number)
            record.append(
                [
                    "stats",
                    stats.step,
                    outcome_of(stats),
                    repr(stats.loss),
                    stats.order_number,
                    stats.stop_votes,
                ]
            )
        if newest > obeyed:
            due = [order for order in inbox if order.number <= newest]
            inbox = [order for order in inbox if order.number > newest]
            record += [
                ["order", step, order.number, order.reason] for order in reducer.share_orders(due)
            ]
            obeyed = newest
        if chance.random() < 0.02:
            time.sleep(chance.random() * 0.005)  # a straggler
        parameter.grad = torch.full((4,), float("inf") if step in poisoned else 1.0)
        decision = clip(global_norm([parameter.grad], [world_size], torch.tensor(2.0)), 1.0)
        if rank == 1 and step == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        while moments and moments[0] == step:
            number = ORDERS - len(moments) + 1
            os.write(write_end, to_line(LrFactor(number, f"order {number}", 0.5)))
            moments.pop(0)
        inbox += control.poll()
        own = RankStats(
            loss_sum=float("inf") if step in poisoned else rank + step,
            tokens=2.0,
            grad_norm=float(decision.norm),
            skipping_ranks=int(decision.skip),
            stop_votes=int(bool(signals.received)),
            order_number=max([obeyed, *(order.number for order in inbox)]),
            step_seconds=float(rank),
        )
        reducer.start(step, own)
        if any(entry[0] == "stats" and entry[2] == "stop" for entry in record[-3:]):
            record.append(["stop", step])
            break
    reducer.collect(before=steps)
    leave_with(record)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
