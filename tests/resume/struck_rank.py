"""Ranks of `opt-train train`, killed at chosen moments. `python -m tests.resume.struck_rank` starts
them for others.

That process imports everything once and forks each rank from there, so that a start costs a second
and fifty kills a few minutes. It reads one `Generation` a line from standard input and answers each
with the exit codes of its ranks.

Moments are seen from outside the product where that is possible: a save has begun when a file under
`checkpoints/` is opened to be written, however and in whatever thread the rank saves.
"""

import contextlib
import hashlib
import json
import os
import random
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from opt_train.protocol.commands import Begin
from opt_train.protocol.facts import InForce, Phase, ShardsSaved
from opt_train.protocol.framing import Message

MANIFEST = "manifest.json"
WRITTEN = os.O_WRONLY | os.O_RDWR
IN_PEACE = -1
"""The number of no strike."""
GENERATION_SECONDS = 60.0
NOTICE_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Strike:
    """One kill: which rank watches for which moment, and whom it takes with it."""

    moment: str
    after: int
    """Steps, files or saves of the attempt that are let pass first."""
    delay_seconds: float
    """From the moment to the kill."""
    rank: int
    """Who watches, and dies."""
    takes_all: bool
    """Its process group, which is all ranks, dies in the same instant; else the others are left to
    notice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Struck:
    """What a strike left on record."""

    moment: str
    step: int
    """Steps taken when it came; -1 before the attempt's first."""
    phase: str


class Striker:
    """Waits in one rank for the moment of one strike."""

    def __init__(self, strike: Strike, record: Path, begin: Begin) -> None:
        self.strike = strike
        self._moment = strike.moment
        self._record = record
        self._checkpoints = os.path.join(begin.run_directory, "checkpoints") + os.sep
        self._first_step = -1
        self._phase = Phase("start", 0)
        self._is_restored = False
        self._saves = 0
        self._files = 0
        self._armed = threading.Lock()

    def published(self, fact: Message) -> None:
        """The rank says `fact`."""
        moment, after = self._moment, self.strike.after
        if isinstance(fact, Phase):
            self._phase = fact
            if fact.phase == "data" and self._first_step < 0:
                self._first_step = fact.step
            trained = self._first_step >= 0 and fact.step >= self._first_step + after
            if moment == fact.phase == "start" or (trained and moment == fact.phase):
                self._arm()
        elif isinstance(fact, InForce):
            self._is_restored = True
            if moment == "restored":
                self._arm()
            elif moment == "restore" and not self._armed.locked():  # there was nothing to restore
                self._moment = "restored"
                self._arm()
        elif isinstance(fact, ShardsSaved):
            self._saves += 1
            if moment in ("saved", "committed") and self._saves == after + 1:
                self._arm(Path(fact.folder) / MANIFEST if moment == "committed" else None)

    def touched(self, path: str, writes: bool) -> None:
        """This process opens a file or makes a folder."""
        if not path.startswith(self._checkpoints):
            return
        if self._moment == "save" and writes and self._saves == self.strike.after:
            self._arm()
        if self._moment == "restore" and not writes and not self._is_restored:
            self._files += 1
            if self._files == self.strike.after + 1:
                self._arm()

    def _arm(self, awaited: Path | None = None) -> None:
        if self._armed.acquire(blocking=False):
            threading.Thread(target=self._kill, args=(awaited,), daemon=True).start()

    def _kill(self, awaited: Path | None) -> None:
        while awaited is not None and not awaited.exists():
            time.sleep(0.0005)
        time.sleep(self.strike.delay_seconds)
        struck = Struck(
            moment=self._moment,
            step=self._phase.step if self._first_step >= 0 else -1,
            phase=self._phase.phase,
        )
        new = self._record.with_suffix(".new")
        new.write_text(json.dumps(asdict(struck)))
        new.rename(self._record)
        if self.strike.takes_all:
            os.killpg(0, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


def strikes_in(folder: Path) -> list[Strike]:
    return [Strike(**each) for each in json.loads((folder / "strikes.json").read_text())]


def record_of(folder: Path, number: int) -> Path:
    return folder / f"struck-{number:03d}.json"


def draw(seed: str) -> Strike:
    """The strike that `seed` stands for."""
    chance = random.Random(seed)
    moments = {
        "start": 1,
        "restore": 3,
        "restored": 1,
        "data": 2,
        "step": 3,
        "waiting": 1,
        "save": 6,
        "saved": 2,
        "committed": 2,
    }
    moment = chance.choices(list(moments), weights=list(moments.values()))[0]
    after = {
        "restore": 1,
        "save": 1,
        "saved": 1,
        "committed": 1,
        "data": 7,
        "step": 7,
        "waiting": 7,
    }.get(moment, 0)
    delay = {
        "start": 0.4,
        "restore": 0.1,
        "restored": 0.02,
        "data": 0.002,
        "committed": 0.02,
        "saved": 0.01,
    }
    return Strike(
        moment=moment,
        after=chance.randint(0, after),
        delay_seconds=chance.uniform(0.0, delay.get(moment, 0.03)),
        rank=chance.randint(0, 1),
        takes_all=chance.random() < 0.6,
    )


STRIKER: list[Striker] = []
"""This rank's, once it has begun."""


def watching(run_rank: Callable[..., int], folder: Path, number: int) -> Callable[..., int]:
    """`run_rank` under the eyes of strike `number`, if this rank is the one that watches."""

    def run_and_watch(begin: Begin, publish: Callable[[Message], None], *arguments: Any) -> int:
        strike = strikes_in(folder)[number]
        if strike.rank != begin.rank:
            return run_rank(begin, publish, *arguments)
        striker = Striker(strike, record_of(folder, number), begin)
        STRIKER.append(striker)
        sys.addaudithook(audit)

        def publish_and_listen(fact: Message) -> None:
            # First: a standalone rank commits a checkpoint while it publishes it.
            striker.published(fact)
            publish(fact)

        return run_rank(begin, publish_and_listen, *arguments)

    return run_and_watch


def audit(event: str, arguments: tuple[Any, ...]) -> None:
    """Python tells this hook of every file that it opens, from any thread."""
    if event not in ("open", "os.mkdir"):
        return
    path = arguments[0]
    if isinstance(path, (str, os.PathLike)):
        writes = event == "os.mkdir" or bool(arguments[2] & WRITTEN)
        STRIKER[0].touched(os.fspath(path), writes)


# Starting ranks -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Generation:
    """What is to be started: the words after `opt-train`, by so many ranks, under strike
    `number`."""

    words: tuple[str, ...]
    world_size: int
    folder: str
    """Of the strikes; the ranks' output goes to `output` in it."""
    number: int = IN_PEACE
    notes_samples: bool = False
    """Each rank appends what it reads to `read-<number>-<rank>` in the folder."""


def serve() -> None:
    """Start generations as long as somebody asks; none outlives this process."""
    import_everything()
    for line in sys.stdin:
        asked = json.loads(line)
        generation = Generation(**{**asked, "words": tuple(asked["words"])})
        print(json.dumps(be_started(generation)), flush=True)


def import_everything() -> None:
    """What ranks need, single-threaded: a process with threads cannot be forked."""
    import hydra  # noqa: F401
    import opt_logbook.render.render  # noqa: F401

    import opt_train.cli.train  # noqa: F401
    from opt_train.train import warm

    warm.import_everything()
    assert threading.active_count() == 1


def be_started(generation: Generation) -> list[int]:
    """Fork the ranks as one process group and wait for all; their exit codes, of a killed one minus
    the signal.

    Once one has been killed the others have a moment to notice, as gloo lets them, and are killed
    then: ranks die together.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group, pids = 0, []
    for rank in range(generation.world_size):
        if (pid := os.fork()) == 0:
            be_rank(generation, rank, port, group)
        with contextlib.suppress(OSError):  # the child does the same: one of the two is first
            os.setpgid(pid, group)
        group = group or pid
        pids.append(pid)
    codes: dict[int, int] = {}
    deadline = time.monotonic() + GENERATION_SECONDS
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
                if codes[pid] < 0:
                    deadline = min(deadline, time.monotonic() + NOTICE_SECONDS)
        if time.monotonic() > deadline:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
            deadline = time.monotonic() + GENERATION_SECONDS
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def be_rank(generation: Generation, rank: int, port: int, group: int) -> NoReturn:
    """In the child: be one rank of `opt-train train`, and end."""
    code = 1
    try:
        os.setpgid(0, group)
        from opt_train.train.warm import die_with_the_agent

        die_with_the_agent()
        output = os.open(
            Path(generation.folder, "output"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644
        )
        for descriptor, of in ((os.open(os.devnull, os.O_RDONLY), 0), (output, 1), (output, 2)):
            os.dup2(descriptor, of)
        if generation.world_size > 1:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(generation.world_size),
                "LOCAL_WORLD_SIZE": str(generation.world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        from opt_train.cli import main as cli
        from opt_train.train import standalone as alone

        if generation.notes_samples:
            note_samples(Path(generation.folder, f"read-{generation.number}-{rank}"))
        if generation.number != IN_PEACE:
            alone.run_rank = watching(alone.run_rank, Path(generation.folder), generation.number)
        code = cli.main(list(generation.words))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def note_samples(path: Path) -> None:
    """From now on every batch that this process reads leaves a line: its cursor, and a hash of each
    sequence."""
    from opt_train.data.batches import Batches

    at = Batches.at

    def at_and_note(batches: Any, cursor: Any, **share: int) -> Any:
        read = at(batches, cursor, **share)
        sequences = [
            hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
            for micro_batch in read
            for tokens, weight in zip(micro_batch.tokens, micro_batch.weights, strict=True)
            if weight > 0
        ]
        with path.open("a") as notes:
            notes.write(json.dumps([cursor.samples, sequences]) + "\n")
        return read

    Batches.at = at_and_note  # type: ignore[method-assign]  # in this process


if __name__ == "__main__":
    serve()
