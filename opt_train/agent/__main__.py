"""``python -m opt_train.agent --run DIR --node NAME --slots N``: be the one agent of a node.

It ignores SIGINT, SIGTERM and SIGUSR1 from birth, because schedulers send these to every process
they can find: it ends on `Leave`, when nobody has led it for `supervisor.orphan_seconds`, or by
SIGKILL, which takes its ranks along.
"""

import argparse
import asyncio
import contextlib
import fcntl
import json
import logging
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from opt_logbook.record.durable_file import replace_file
from opt_logbook.record.run_directory import RunDirectory

from opt_train.agent.agent import LEAVE_SECONDS, LOG_SECONDS, Agent, AgentOptions
from opt_train.agent.core_binding import cores_of_slots, format_cores
from opt_train.agent.node_code import code_of_agent, copy_to_node
from opt_train.burn_in.command import node_command
from opt_train.config.run_config import from_json
from opt_train.host import signals
from opt_train.host.log_thread import written_beside
from opt_train.host.processes import NODE_MARK, mark_of, stat_of

LOCK_POLL_SECONDS = 0.05

log = logging.getLogger("opt_train.agent")


def main(arguments: list[str]) -> int:
    """Run the agent; 0 when it left in good order, 1 when the node has one already."""
    signals.ignore()
    if os.getsid(0) != os.getpid():
        # A group leader that is no session leader stays where it is.
        with contextlib.suppress(PermissionError):
            os.setsid()
    into = logging.StreamHandler()
    into.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    # A thread of its own writes the log: it may lie on a file system that stands still.
    queued, writing = written_beside(into)
    logging.basicConfig(handlers=[queued], level=logging.INFO)
    writing.start()
    try:
        return serve(read_options(arguments))
    finally:
        stopping = threading.Thread(target=writing.stop, daemon=True)
        stopping.start()
        stopping.join(LOG_SECONDS)


def read_options(arguments: list[str]) -> AgentOptions:
    """The options on the command line, and what the run's `config.json` adds.

    Raises:
        OSError, ValueError, BadInput: the configuration cannot be read.
    """
    parser = argparse.ArgumentParser(prog="python -m opt_train.agent", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run directory")
    parser.add_argument("--node", required=True)
    parser.add_argument("--slots", type=int, required=True, help="ranks of this node")
    parser.add_argument("--give-back", default="", help="command that ends the allocation")
    given = parser.parse_args(arguments)
    run = RunDirectory(given.run.resolve())
    config = from_json(run.config_json)
    cluster, checkpoint = config.cluster, config.checkpoint
    ranks_here = cluster.ranks_per_machine(given.slots * cluster.nodes)
    # The cores this process may use: a scheduler may have bound it to fewer than there are.
    allowed = os.sched_getaffinity(0)
    cores: tuple[frozenset[int], ...] = ()
    if cluster.binds_ranks:
        cores = tuple(cores_of_slots(given.slots, allowed, os.environ.get("CUDA_VISIBLE_DEVICES")))
    return AgentOptions(
        run=run,
        node=given.node,
        slots=given.slots,
        rank_module=cluster.rank_module,
        orphan_seconds=config.supervisor.orphan_seconds,
        threads=config.train.threads or max(1, len(allowed) // ranks_here),
        code=copy_to_node(code_of_agent(), checkpoint.node_directory)
        if cluster.code == "node"
        else None,
        cores=cores,
        interface=cluster.collectives_interface,
        memory_every_steps=checkpoint.memory_every_steps,
        node_directory=checkpoint.node_directory,
        preflight=tuple(node_command(run.path, given.node)),
        preflight_seconds=config.burn_in.seconds,
        heartbeat_seconds=cluster.heartbeat_seconds,
        give_back=tuple(shlex.split(given.give_back)),
    )


def serve(options: AgentOptions) -> int:
    """Be the node's agent until it leaves; see `main`."""
    # Whoever started this may have set it; a person who did not must get a node that can be fenced.
    os.environ[NODE_MARK] = mark_of(options.run.path, options.node)
    for slot, cores in enumerate(options.cores):
        log.info("slot %d: ranks run on cores %s", slot, format_cores(cores) or "of the agent")
    deregister = register_node(options.run, options.node)
    if deregister is None:
        log.info("node %s has an agent already", options.node)
        return 1

    async def run() -> None:
        await Agent(options, deregister).run()

    asyncio.run(run())
    log.info("left")
    return 0


def register_node(run: RunDirectory, node: str) -> Callable[[], None] | None:
    """Become the node's one agent, for the life of this process, and register; None if the node has
    one already.

    The result takes the registration back.
    """
    folder = run.nodes / node
    run.make_folder(folder)
    # flock, not a file that exists: the kernel lets go of it with the process, however that dies.
    lock = os.open(folder / "agent.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    registration = folder / "agent.json"
    deadline = time.monotonic() + 2 * LEAVE_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            # One that is leaving has taken its registration back already: wait for it.
            if registration.exists() or time.monotonic() > deadline:
                os.close(lock)
                return None
            time.sleep(LOCK_POLL_SECONDS)
    # With its start time, so that a later process with the same pid is not taken for it.
    me = stat_of(os.getpid())
    fields = {"node": node, "pid": os.getpid(), "start_ticks": me.start_ticks if me else 0}
    replace_file(registration, json.dumps(fields).encode() + b"\n")
    return lambda: registration.unlink(missing_ok=True)


if __name__ == "__main__":
    # Without the interpreter's own end, which would wait for a thread that a dead file system keeps
    # in a write.
    os._exit(main(sys.argv[1:]))
