"""A rank without torch: it speaks a rank's protocol and misbehaves as `config_path` tells it to.

The configuration is a JSON object: `steps`, `step_seconds`, `deaf` (ignore SIGTERM), `garbage`
(lines that are no facts before the first step), `flood` (write garbage for ever), `exit_at` and
`exit_code` (leave without a word at a step), `child` (start a process that sleeps), `say` (bytes in
hex, written to the facts pipe). With STDLIB_RANK_FAILS in its environment it dies while it warms.
"""

import argparse
import faulthandler
import json
import os
import select
import signal
import subprocess
import sys
import time

from opt_train.protocol.commands import Begin
from opt_train.protocol.facts import (
    ExitNotice,
    InForce,
    Metrics,
    OrderObeyed,
    Phase,
    RolledBack,
    Store,
    Warm,
)
from opt_train.protocol.framing import from_line, to_line
from opt_train.protocol.orders import RollBack, SaveAndStop


def set_signals(config):
    if config.get("dies_when_asked"):
        faulthandler.unregister(signal.SIGUSR2)
        signal.signal(signal.SIGUSR2, signal.SIG_DFL)
    if config.get("deaf"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--facts-fd", type=int, required=True)
    parser.add_argument("--control-fd", type=int, required=True)
    given = parser.parse_args()
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    if os.environ.get("STDLIB_RANK_FAILS"):
        print("ImportError: no module named torch", file=sys.stderr)
        return 1

    def send(fact):
        os.write(given.facts_fd, to_line(fact))

    control = os.fdopen(given.control_fd, "rb", buffering=0)
    send(Warm(os.getpid(), 0.01))
    line = control.readline()
    if not line:
        return 0
    begin = from_line(line)
    assert isinstance(begin, Begin)
    with open(begin.config_path) as file:
        config = json.load(file)
    set_signals(config)
    print(f"rank {begin.rank} of generation {begin.generation} begins", flush=True)
    send(Phase("start", -1))
    if begin.rank == 0 and begin.store_port == 0:
        send(Store("127.0.0.1", 4242))
    if config.get("child"):
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    for number in range(config.get("garbage", 0)):
        os.write(
            given.facts_fd,
            [b"\xff\xfe not json\n", b'{"kind":"evil"}\n', b"x" * 9000 + b"\n"][number % 3],
        )
    for text in config.get("say", []):
        os.write(given.facts_fd, bytes.fromhex(text) + b"\n")
    while config.get("flood"):
        os.write(given.facts_fd, b"y" * 65536)
    send(InForce({"lr": 0.1}))
    for step in range(config.get("steps", 1000)):
        send(Phase("step", step))
        with open(os.path.join(begin.run_directory, "who_trains.log"), "a") as file:
            file.write(f"{begin.generation} {begin.rank} {step}\n")
        if step == config.get("exit_at", -1):
            print("RuntimeError: boom <b>", flush=True)
            return config.get("exit_code", 1)
        time.sleep(config.get("step_seconds", 0.02))
        if begin.rank == 0:
            send(Metrics({"attempt": begin.attempt, "step": step, "loss": 2.0}))
        if select.select([control], [], [], 0)[0] and (line := control.readline()):
            order = from_line(line)
            send(OrderObeyed(order.number, step))
            if isinstance(order, RollBack):
                send(RolledBack(order.step, order.attempt, order.generation))
                send(InForce({"lr": 0.2}))
                continue
            assert isinstance(order, SaveAndStop)
            send(ExitNotice(75, step, "asked to stop"))
            return 75
    send(ExitNotice(0, config.get("steps", 1000) - 1, "done"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
