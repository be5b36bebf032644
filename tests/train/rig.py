"""Real ranks for tests: prepared data, a configuration, and an agent's half of the pipes."""

import contextlib
import fcntl
import hashlib
import json
import os
import select
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from safetensors import safe_open

from opt_train.checkpoint import manifest
from opt_train.checkpoint.commit import build_manifest, commit_manifest
from opt_train.checkpoint.config import CheckpointConfig
from opt_train.config.run_config import RunConfig, to_json
from opt_train.data.config import DataConfig, TokenizerConfig
from opt_train.data.prepare import prepare
from opt_train.model.config import ModelConfig
from opt_train.optim.config import OptimConfig
from opt_train.parallel.config import PrecisionConfig
from opt_train.protocol.commands import Begin
from opt_train.protocol.facts import ExitNotice, InForce, Metrics, ShardsSaved, Store, Warm
from opt_train.protocol.framing import Message, from_line, to_line
from opt_train.train.config import TrainConfig
from tests.train import forked
from tests.train.forked import Forked

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_SECONDS = 60.0
SCRIPT_SECONDS = 180.0
PIPE_BYTES = 1 << 20
"""More than a rank of a test publishes: a test that is slow to read loses no metrics."""

TINY = ModelConfig(
    name="tiny", layers=2, heads=4, d_model=64, ffn=128, vocab_size=512, positions=64, dropout=0.1
)


def environment() -> dict[str, str]:
    """What a rank of a test runs under: one thread, the loopback interface."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": str(ROOT),
    }


def tiny_config(folder: Path, **train: Any) -> RunConfig:
    """A run of a tiny model on a small corpus, prepared in `folder` once."""
    corpus = folder / "corpus"
    if not corpus.exists():
        corpus.mkdir()
        for number in range(24):
            words = [f"w{(number * 7 + i * i) % 97} x{i % 13}" for i in range(400)]
            (corpus / f"{number:02d}.txt").write_text(" ".join(words))
    config = RunConfig(
        name="tiny",
        seed=7,
        model=TINY,
        data=DataConfig(
            name="tiny",
            corpus=str(corpus),
            directory=str(folder / "prepared"),
            validation_fraction=0.1,
            sequence_length=64,
        ),
        tokenizer=TokenizerConfig(vocab_size=400),
        precision=PrecisionConfig(compute="fp32"),
        optim=OptimConfig(lr=3e-3, warmup_steps=4),
        train=TrainConfig(
            **{"steps": 12, "global_batch": 8, "micro_batch": 2, "device": "cpu", "threads": 1}
            | {"collective_timeout_seconds": 40.0}
            | train
        ),
        checkpoint=CheckpointConfig(every_steps=0),
    )
    prepare(config.data, config.tokenizer, lambda line: None)
    return config


def begin_alone(folder: Path, config: RunConfig) -> Begin:
    """`config` written into `folder`, and the `Begin` of a rank that trains it with nobody beside
    it."""
    path = folder / "config.json"
    path.write_text(to_json(config))
    return Begin(
        generation=1,
        attempt="1.00",
        node="n0",
        slot=0,
        rank=0,
        world_size=1,
        local_rank=0,
        store_host="",
        store_port=0,
        config_path=str(path),
        config_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        run_directory=str(folder),
        checkpoint=None,
        manifest_sha256=None,
        order_number=0,
    )


def run_script(
    script: Path,
    world_size: int,
    *arguments: str,
    folder: Path,
    seconds: float = SCRIPT_SECONDS,
    imports: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Run `script rank world_size store arguments...` as `world_size` processes; each prints one
    JSON object, last. `imports`: done before the fork, where they take seconds in each of many
    ranks."""
    store = folder / f"store-{time.monotonic_ns()}"
    commands = [
        [str(script), str(rank), str(world_size), str(store), *arguments]
        for rank in range(world_size)
    ]
    printed = run_at_once(commands, seconds, imports)
    return [json.loads(output.splitlines()[-1]) for output in printed]


def run_at_once(
    commands: Sequence[Sequence[str]],
    seconds: float = SCRIPT_SECONDS,
    imports: Sequence[str] = (),
) -> list[str]:
    """What forked processes print, one for each command; all must end well."""
    server = forked.server(*imports)
    with contextlib.ExitStack() as files:
        outputs = [files.enter_context(tempfile.TemporaryFile()) for _ in commands]
        errors = [files.enter_context(tempfile.TemporaryFile()) for _ in commands]
        children = [
            server.start(command, env=environment(), stdout=output, stderr=error)
            for command, output, error in zip(commands, outputs, errors, strict=True)
        ]
        try:
            deadline = time.monotonic() + seconds
            for child, error in zip(children, errors, strict=True):
                code = child.wait(timeout=max(0.1, deadline - time.monotonic()))
                error.seek(0)
                assert code == 0, error.read().decode()[-3000:]
            for output in outputs:
                output.seek(0)
            return [output.read().decode() for output in outputs]
        finally:
            for child in children:
                kill_group(child)


@dataclass
class Rank:
    """One `opt_train.train.warm` process, or a module that wraps it, with the agent's ends of its
    pipes."""

    log: Path
    process: Forked
    facts_fd: int
    control_fd: int
    facts: list[Message] = field(default_factory=list)
    rest: bytes = b""

    @classmethod
    def start(cls, folder: Path, rank: int, module: str = "opt_train.train.warm") -> Self:
        facts_read, facts_write = os.pipe()
        with contextlib.suppress(PermissionError):  # a user's pipes have a limit in all
            fcntl.fcntl(facts_read, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        control_read, control_write = os.pipe()
        log = folder / f"rank{rank}-{time.monotonic_ns()}.log"
        with log.open("ab") as output:
            process = forked.server().start(
                ["-m", module, f"--facts-fd={facts_write}", f"--control-fd={control_read}"],
                pass_fds=(facts_write, control_read),
                env=environment(),
                stdout=output,
                stderr=output,
            )
        os.close(facts_write)
        os.close(control_read)
        os.set_blocking(facts_read, False)
        return cls(log=log, process=process, facts_fd=facts_read, control_fd=control_write)

    def send(self, message: Message) -> None:
        os.write(self.control_fd, to_line(message))

    def read(self) -> None:
        """Take in what has come; does not wait."""
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self.facts_fd, 1 << 16):
                *lines, self.rest = (self.rest + piece).split(b"\n")
                self.facts += [from_line(line) for line in lines]

    def published(self, kind: type[Message]) -> list[Any]:
        """The facts of one kind so far."""
        return [fact for fact in self.facts if isinstance(fact, kind)]

    @property
    def leaving(self) -> ExitNotice | None:
        """Its exit notice, which must be the last fact."""
        self.read()
        return self.facts[-1] if self.facts and isinstance(self.facts[-1], ExitNotice) else None

    @property
    def metrics(self) -> dict[int, dict[str, Any]]:
        """Metrics lines by step."""
        return {fact.line["step"]: dict(fact.line) for fact in self.published(Metrics)}


class World:
    """The ranks of one generation, as agents would start them."""

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        world_size: int = 2,
        module: str = "opt_train.train.warm",
    ) -> None:
        self.folder, self.config = folder, config
        self.ranks = [Rank.start(folder, rank, module) for rank in range(world_size)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for rank in self.ranks:
            kill_group(rank.process)
            os.close(rank.facts_fd)
            with contextlib.suppress(OSError):
                os.close(rank.control_fd)

    def begin(
        self,
        *,
        attempt: str = "1.00",
        generation: int = 1,
        checkpoint: Path | None = None,
        restore: str | None = None,
        **changes: Any,
    ) -> None:
        """Turn the warm processes into ranks. `restore`: a checkpoint that need not exist."""
        run_directory = self.folder / "run"
        run_directory.mkdir(exist_ok=True)
        config_path = run_directory / "config.json"
        config_path.write_text(to_json(self.config))
        begin = Begin(
            generation=generation,
            attempt=attempt,
            node="n0",
            slot=0,
            rank=0,
            world_size=len(self.ranks),
            local_rank=0,
            store_host="127.0.0.1",
            store_port=0,
            config_path=str(config_path),
            config_sha256=hashlib.sha256(config_path.read_bytes()).hexdigest(),
            run_directory=str(run_directory),
            checkpoint=None if checkpoint is None else str(checkpoint),
            manifest_sha256=None
            if checkpoint is None
            else sha256_of(checkpoint / manifest.MANIFEST),
            order_number=0,
            journal_head="ab" * 32,
        )
        begin = replace(begin, **({"checkpoint": restore} if restore else {}), **changes)
        self.wait(lambda: all(rank.published(Warm) for rank in self.ranks), "warm")
        self.ranks[0].send(begin)
        if len(self.ranks) == 1:
            return
        self.wait(
            lambda: bool(self.ranks[0].published(Store) or self.ranks[0].leaving), "the store"
        )
        if self.ranks[0].leaving:
            return
        port = self.ranks[0].published(Store)[-1].port
        for number, rank in enumerate(self.ranks[1:], start=1):
            rank.send(replace(begin, rank=number, slot=number, store_port=port))

    def wait(
        self, until: Callable[[], bool], what: str, reading: Sequence[Rank] | None = None
    ) -> None:
        """Read facts until `until()`; fail with the logs' ends after a minute without any, or if a
        rank dies unexpectedly."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        readers = self.ranks if reading is None else reading
        known = -1
        while not until():
            select.select([rank.facts_fd for rank in readers], [], [], 0.05)
            ended = [rank.process.poll() is not None for rank in self.ranks]
            for rank in readers:
                rank.read()
            if (count := sum(len(rank.facts) for rank in readers)) > known:
                known, deadline = count, time.monotonic() + DEADLINE_SECONDS
            assert time.monotonic() < deadline, f"{what} did not come:\n{self.logs()}"
            if all(ended) and not until():
                raise AssertionError(f"all ranks ended before {what}:\n{self.logs()}")
            if any(ended):
                time.sleep(0.02)

    def wait_for_step(self, step: int) -> None:
        """Until rank 0 has published the metrics of `step`."""
        self.wait(lambda: max(self.ranks[0].metrics, default=0) >= step, f"step {step}")

    def finish(self) -> list[ExitNotice]:
        """Wait for the end of all ranks; their exit notices."""
        self.wait(lambda: all(rank.process.poll() is not None for rank in self.ranks), "the end")
        leavings = []
        for rank in self.ranks:
            leaving = rank.leaving
            assert leaving is not None, self.logs()
            assert leaving.code == rank.process.returncode, self.logs()
            leavings.append(leaving)
        return leavings

    def commit(self, step: int) -> Path:
        """Do the supervisor's part: commit the manifest of the checkpoint at `step` from what the
        ranks reported."""
        reports = [
            fact for rank in self.ranks for fact in rank.published(ShardsSaved) if fact.step == step
        ]
        assert len(reports) == len(self.ranks), (
            f"{len(reports)} ranks saved step {step}:\n{self.logs()}"
        )
        folder = Path(reports[0].folder)
        files = {file.path: (file.bytes, file.sha256) for fact in reports for file in fact.files}
        commit_manifest(folder, build_manifest(folder, folder.parent.name, step, files))
        return folder

    def newest_save(self) -> int:
        """The newest step that every rank has saved; -1: none."""
        saved = ({fact.step for fact in rank.published(ShardsSaved)} for rank in self.ranks)
        return max(set.intersection(*saved), default=-1)

    def in_force(self, rank: int = 0) -> dict[str, Any]:
        return dict(self.ranks[rank].published(InForce)[-1].values)

    def logs(self) -> str:
        return "\n".join(f"--- {rank.log.name}\n{ends_of(rank.log)}" for rank in self.ranks)

    def kill(self) -> None:
        """SIGKILL all ranks at once, as a lost machine would."""
        for rank in self.ranks:
            kill_group(rank.process)


def ends_of(log: Path, most: int = 3000) -> str:
    """A log, of a long one its beginning and its end: what a fatal signal was stands first, what
    Python raised stands last."""
    text = log.read_text()
    return text if len(text) <= 2 * most else f"{text[:most]}\n[...]\n{text[-most:]}"


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tensors_in(folder: Path) -> dict[tuple[str, str], str]:
    """Hash of each tensor in a checkpoint's shards, by its name and its place in the whole.

    Neither by file nor the file's own hash: a header has no fixed order, and what all ranks have
    alike is written by any of them.
    """
    hashes = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "numpy") as shard:
            places = json.loads((shard.metadata() or {}).get("DCP_SHARDING_INFO", "{}"))
            for name in shard.keys():  # noqa: SIM118  it is no dictionary
                key = name, json.dumps(places.get(name))
                assert key not in hashes, f"{name} is twice in {folder}"
                hashes[key] = hashlib.sha256(shard.get_tensor(name).tobytes()).hexdigest()
    return hashes


def kill_group(process: Forked) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=DEADLINE_SECONDS)
