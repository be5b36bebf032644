"""`opt-train train`: the same rank without an agent, as a single process or as torchrun starts it.
It obeys nothing but signals."""

import gc
import json
import os
import signal
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch
import torch.distributed as dist

from opt_train.config.run_config import RunConfig
from opt_train.protocol.commands import Begin
from opt_train.protocol.exits import BAD_INPUT, BadInput
from opt_train.protocol.facts import ExitNotice, ShardsSaved
from opt_train.protocol.framing import Message, from_line, to_line
from opt_train.protocol.standalone import StandaloneBegin
from opt_train.run.ledger import from_json
from opt_train.train.orders import NoOrders, StopSignals
from opt_train.train.rank import run_rank
from opt_train.train.rendezvous import choose_device, join, join_by_environment

PublishFrom = Callable[[int, Message], None]
"""Called with (rank, fact) on rank 0: its own facts, and every rank's `ShardsSaved`, which a
committer needs."""


def train_standalone(
    config: RunConfig,
    open_run: Callable[[], StandaloneBegin],
    reject_checkpoint: Callable[[str], StandaloneBegin],
    publish: PublishFrom,
) -> int:
    """Train to the end, in one process or as one of torchrun's; returns the rank's exit code
    (protocol/exits.py).

    Args:
        open_run: called on rank 0 alone, once the ranks have met: opens journal and run, and
            decides what to resume.
        reject_checkpoint: called on rank 0 alone, with the reason, when the ranks have found that
            what they were to resume is corrupt: decides what to resume instead.
        publish: called on rank 0 alone.

    Raises:
        BadInput: the configuration cannot work here, or `open_run` or `reject_checkpoint` refuses
            (rank 0 alone; the others return 2).
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    signals = StopSignals()
    signals.listen(signal.SIGINT)
    # For one process the loopback will do; gloo would look up the host's name, which not every
    # machine can.
    interface = config.cluster.interface or ("" if "RANK" in os.environ else "lo")
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    device = choose_device(config.train.device, local_rank)

    if "RANK" in os.environ:
        group = join_by_environment(config, device)
    else:
        group = join(_begin(), config, device, _discard)
    decide = open_run
    while True:
        try:
            decided = _decide(decide, rank, group)
        except BadInput:
            dist.destroy_process_group()
            raise
        if decided is None:
            dist.destroy_process_group()
            return BAD_INPUT
        begin = _begin(decided, rank, world_size, local_rank)
        gatherer = _FactGatherer(publish, rank, world_size, group)
        code = run_rank(begin, gatherer, NoOrders(), signals, gatherer.join)
        if not gatherer.found_corrupt:
            dist.destroy_process_group()
            return code
        # What the attempt had built is in cycles, and may fill a GPU that the next one needs.
        gc.collect()
        decide = partial(reject_checkpoint, gatherer.exit_reason)


def _begin(
    decided: StandaloneBegin | None = None, rank: int = 0, world_size: int = 1, local_rank: int = 0
) -> Begin:
    if decided is None:
        # The ranks meet before rank 0 has opened the run: only the place of the store matters then.
        decided = StandaloneBegin(attempt="", config_path="", config_sha256="", run_directory="")
    return Begin(
        generation=1,
        attempt=decided.attempt,
        node="alone",
        slot=local_rank,
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        store_host="127.0.0.1",
        store_port=0,
        config_path=decided.config_path,
        config_sha256=decided.config_sha256,
        run_directory=decided.run_directory,
        checkpoint=decided.checkpoint,
        manifest_sha256=decided.manifest_sha256,
        order_number=decided.order_number,
        ledger=from_json(decided.ledger),
        journal_head=decided.journal_head,
    )


def _discard(fact: Message) -> None:
    """Nobody needs to know where the store is."""


def _decide(
    open_run: Callable[[], StandaloneBegin], rank: int, group: dist.ProcessGroup
) -> StandaloneBegin | None:
    """Rank 0's decision on every rank; None where it could not decide."""
    payload = b""
    try:
        if rank == 0:
            payload = json.dumps(asdict(open_run())).encode()
    finally:
        payloads = _gather(payload, group)
    return StandaloneBegin(**json.loads(payloads[0])) if payloads[0] else None


class _FactGatherer:
    """Takes facts like a `FactPipe`: rank 0's go to the caller, the others' are dropped but for
    `ShardsSaved`."""

    def __init__(
        self, publish: PublishFrom, rank: int, world_size: int, group: dist.ProcessGroup
    ) -> None:
        self._publish, self._rank, self._world_size, self._group = publish, rank, world_size, group
        self.exit_reason = ""
        self.found_corrupt = False
        """The ranks have agreed that the checkpoint cannot be restored; true on all or none."""
        self._has_joined = False

    def join(self, *_: object) -> dist.ProcessGroup:
        """The group, which has met already."""
        self._has_joined = True
        return self._group

    def __call__(self, fact: Message) -> None:
        if isinstance(fact, ExitNotice):
            # Behind the joining such a verdict is one of all ranks. Before it, it is one rank's
            # own: the others are in a collective by now, which cannot be met by asking for another
            # checkpoint.
            self.found_corrupt = self._has_joined and fact.cause == "corrupt_checkpoint"
            self.exit_reason = fact.reason
        if not isinstance(fact, ShardsSaved):
            if self._rank == 0:
                self._publish(0, fact)
            return
        # All ranks report this at the same place: a save succeeds everywhere or nowhere.
        lines = _gather(to_line(fact), self._group)
        if self._rank == 0:
            for rank, line in enumerate(lines):
                self._publish(rank, from_line(line))
        # Nobody trains on before the manifest stands: a crash right behind a save then finds it.
        dist.barrier(group=self._group)


def _gather(payload: bytes, group: dist.ProcessGroup) -> list[bytes]:
    """Every rank's bytes, on every rank."""
    world_size = dist.get_world_size(group)
    sizes = torch.zeros(world_size, dtype=torch.int64)
    sizes[dist.get_rank(group)] = len(payload)
    dist.all_reduce(sizes, group=group)
    row = torch.zeros(max(1, int(sizes.max())), dtype=torch.uint8)
    row[: len(payload)] = torch.tensor(list(payload), dtype=torch.uint8)
    rows = [torch.empty_like(row) for _ in range(world_size)]
    dist.all_gather(rows, row, group=group)
    return [bytes(each[: int(size)].tolist()) for each, size in zip(rows, sizes, strict=True)]
