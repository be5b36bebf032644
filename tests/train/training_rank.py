"""A real rank with one fault planted inside; prints its metrics, orders and exit notice. Run by
tests, as a script.

The specification is a JSON file: `config`, `run_directory`, and optionally `poison` [rank, step],
`terminate` [rank, step], `orders` [[step, number], ...]: the orders that reach rank 0 in the middle
of that step.
"""

import hashlib
import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from opt_train.model.decoder import Loss
from opt_train.optim.clip import local_part
from opt_train.protocol.commands import Begin
from opt_train.protocol.framing import Message, to_line, to_payload
from opt_train.train.loop import train
from opt_train.train.orders import ControlPipe, StopSignals
from opt_train.train.rank import start
from opt_train.train.training import Training
from tests.train.leave import leave_with
from tests.train.lr_factor import LrFactor


def plant(
    run: Training, poison_step: int, terminate_step: int, orders: list[list[int]], orders_fd: int
) -> None:
    """At one step the rank's loss becomes infinite; at another somebody sends it SIGTERM; at some,
    orders."""
    model = run.engine.model
    forward = model.forward
    orders = list(orders)

    def faulty(*arguments: torch.Tensor) -> torch.Tensor | Loss:
        loss = forward(*arguments)
        if not model.training:
            return loss
        if run.state.step == terminate_step:
            os.kill(os.getpid(), signal.SIGTERM)
        while orders and orders[0][0] <= run.state.step:
            os.write(orders_fd, to_line(LrFactor(orders.pop(0)[1], "a test wants it", 0.5)))
        assert isinstance(loss, Loss)
        return (
            loss._replace(loss_sum=loss.loss_sum * math.inf)
            if run.state.step == poison_step
            else loss
        )

    model.forward = faulty  # type: ignore[method-assign]  # planted in this one instance


def main(rank: int, world_size: int, store: str, specification: str) -> None:
    given: dict[str, Any] = json.loads(Path(specification).read_text())
    read_end, write_end = os.pipe()
    control, signals = ControlPipe(read_end), StopSignals()
    signals.listen()
    facts: list[Message] = []
    content = Path(given["config"]).read_bytes()
    begin = Begin(
        generation=1,
        attempt="1.00",
        node="n0",
        slot=rank,
        rank=rank,
        world_size=world_size,
        local_rank=0,
        store_host="",
        store_port=0,
        config_path=given["config"],
        config_sha256=hashlib.sha256(content).hexdigest(),
        run_directory=given["run_directory"],
        checkpoint=None,
        manifest_sha256=None,
        order_number=0,
    )

    def joins(*_: object) -> dist.ProcessGroup:
        dist.init_process_group(
            "gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size
        )
        return dist.new_group(backend="gloo")

    run = start(begin, facts.append, control, signals, joins)
    poison, terminate = given.get("poison", [-1, -1]), given.get("terminate", [-1, -1])
    plant(
        run,
        poison[1] if poison[0] == rank else -1,
        terminate[1] if terminate[0] == rank else -1,
        given.get("orders", []) if rank == 0 else [],
        write_end,
    )
    leaving = train(run)
    facts.append(leaving)
    state = run.state
    summary = {
        "facts": [to_payload(fact) for fact in facts],
        "state": to_payload(state.to_json()),
        "words": {"losses": [repr(loss) for loss in state.losses], "updates": state.updates},
        "weights": hashlib.sha256(
            b"".join(
                local_part(parameter.detach()).numpy().tobytes()
                for parameter in run.engine.model.parameters()
            )
        ).hexdigest(),
        "optimizer_steps": sorted(
            {float(each["step"]) for each in run.engine.optimizer.state.values()}
        ),
    }
    leave_with(summary)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
