"""A realistic run directory: what the demo's supervisor writes, without running it.

Attempt 1.00 trains from step 0; node-2 dies at step 60 and node-3 takes its place, restarted from
step 50; a rank is killed at 120, restarted from 100; done at 200. All is computed from constants,
so it is the same bytes each time.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opt_logbook.record.events import (
    AttemptEnded,
    AttemptStarted,
    CheckpointCommitted,
    CheckpointRetired,
    Entry,
    Event,
    Evidence,
    FailureSeen,
    GenerationKilled,
    IncidentClosed,
    IncidentDiagnosed,
    InForceReported,
    LineageOpened,
    NodeFailed,
    NodeJoined,
    NodePromoted,
    Note,
    OrderEnded,
    OrderGiven,
    RunCreated,
    RunFinished,
    SupervisorStarted,
    TrainingBegan,
    ValidationMeasured,
)
from opt_logbook.record.journal import Journal
from opt_logbook.record.lock import Lock
from opt_logbook.record.metrics import MetricsWriter
from opt_logbook.record.run_directory import RunDirectory

START = 1795356185.25  # 2026-11-22 14:03:05.250 UTC
STEP_SECONDS = 0.55
TOKENS_PER_STEP = 16 * 256
NODES = ("node-1", "node-2")


class DemoRun:
    """Writes a run as its supervisor would, with a clock of its own."""

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.run = RunDirectory(path)
        self.lock = Lock.acquire(self.run, leader=1)
        self.journal = Journal.open(self.run, self.lock)
        self.metrics = MetricsWriter(self.run)
        self.now = START
        self.attempt = ""
        self.generation = 0
        self.latest: tuple[str, str] = ("", "")

    def append(self, event: Event, step: int | None = None, seconds: float = 0.0) -> Entry:
        self.now += seconds
        return self.journal.append(Entry(self.now, self.attempt, step, event))

    def create(self, name: str = "demo", steps: int = 200) -> None:
        self.append(
            RunCreated(
                name=name,
                seed=0,
                model="opt-demo",
                parameters=3_684_096,
                steps=steps,
                tokens_per_step=TOKENS_PER_STEP,
                tokenizer="bpe, 4096 entries",
                data="stdlib",
                data_fingerprint="9f2c51d0a7",
                train_tokens=3_912_448,
                validation_tokens=81_920,
                unigram_perplexity=702.4,
                learning_rate=2e-3,
            )
        )
        self.append(LineageOpened(1, "c0ffee" * 10 + "beef"))
        self.append(SupervisorStarted(1, "laptop", 4242, "0.1.0", resumed=False))
        for node, role in (("node-1", "active"), ("node-2", "active"), ("node-3", "buffer")):
            self.append(NodeJoined(node, role, 1), seconds=0.4)

    def start(
        self, attempt: str, step: int, nodes: tuple[str, ...], buffer: tuple[str, ...], **how: Any
    ) -> None:
        parent, self.attempt, self.generation = self.attempt, attempt, self.generation + 1
        self.append(
            AttemptStarted(
                generation=self.generation,
                parent=parent,
                checkpoint=self.latest[0],
                manifest_sha256=self.latest[1],
                nodes=nodes,
                buffer=buffer,
                world_size=2,
                config_sha256="c0ffee" * 10 + "beef",
                git_commit="713bb44",
                packages={"torch": "2.13.0", "opt-train": "0.1.0"},
                **how,
            ),
            step,
            seconds=0.3,
        )
        self.append(
            InForceReported({"lr": 2e-3, "beta1": 0.9, "clip": 1.0, "cursor": step * 16}),
            step,
            seconds=0.9,
        )
        self.now += 0.9
        self.metrics.append(self.attempt, metrics_line(step + 1, self.now), str(self.journal.head))
        self.append(TrainingBegan(self.generation, 1.8), step + 1)

    def train(self, first: int, last: int, save_every: int = 50, validate_every: int = 50) -> None:
        for step in range(first, last + 1):
            self.now += STEP_SECONDS
            line = metrics_line(step, self.now)
            self.metrics.append(self.attempt, line, str(self.journal.head))
            if step % save_every == 0:
                self.save(step)
            if step % validate_every == 0:
                loss = loss_at(step) + 0.12
                self.append(
                    ValidationMeasured("validation", loss, math.exp(loss), 81_920),
                    step,
                    seconds=0.8,
                )

    def save(self, step: int) -> None:
        folder = self.run.checkpoint(self.attempt, step)
        folder.mkdir(parents=True)
        text = json.dumps({"step": step, "journal_head": self.journal.head.hash}).encode()
        (folder / "manifest.json").write_bytes(text)
        path, sha256 = str(folder.relative_to(self.run.path)), hashlib.sha256(text).hexdigest()
        self.latest = (path, sha256)
        self.append(
            CheckpointCommitted(path, sha256, 44_300_000, 5, 0.41, healthy=True), step, seconds=0.4
        )

    def lose_node(self) -> None:
        """node-2, agent and ranks, is gone after step 60."""
        self.append(
            FailureSeen(1, 1, "node-2", 1, "node-2 went silent: its agent's connection closed"),
            60,
            seconds=0.7,
        )
        self.append(GenerationKilled(1, 1, 1), 60, seconds=1.0)
        evidence = (
            Evidence("", 0, "the cluster says node-2 is down: its agent's process is gone"),
            Evidence("", 0, "no word from node-2 for 1.0 s"),
            Evidence(
                "logs/1.00/node-1/rank0.log",
                41,
                "[rank0]: RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by "
                "peer [127.0.0.1]:41873",
            ),
        )
        self.append(
            IncidentDiagnosed(
                1,
                "node_failure",
                "hardware",
                "the whole node went down, its agent included",
                0.95,
                "node-2",
                1,
                evidence,
                "node-3 takes the place of node-2; restart from the last good checkpoint",
            ),
            60,
            seconds=0.1,
        )
        self.append(NodeFailed("node-2", 1, "node_failure"), 60)
        self.append(NodePromoted("node-3", "node-2", 1), 60)
        self.append(AttemptEnded(1, "failed"), 60)
        self.start(
            "1.01", 50, ("node-1", "node-3"), (), reason="node_failure on node-2", incident=1
        )
        self.append(IncidentClosed(1, "recovered", 10, 4.5 + 10 * STEP_SECONDS, 4.5), 51)

    def lose_rank(self) -> None:
        """Somebody kills rank 0 after step 120."""
        self.append(
            FailureSeen(2, 2, "node-1", 0, "rank 0 was ended by SIGKILL in phase step"),
            120,
            seconds=0.6,
        )
        self.append(GenerationKilled(2, 2, 1), 120, seconds=1.0)
        evidence = (
            Evidence("", 0, "rank 0 on node-1 ended by signal 9; its agent did not send it"),
            Evidence(
                "logs/1.01/node-3/rank1.log",
                57,
                "RuntimeError: Connection closed by peer [127.0.0.1]:52110",
            ),
        )
        self.append(
            IncidentDiagnosed(
                2,
                "killed",
                "unknown",
                "SIGKILL that nobody owns up to; no sign of an out-of-memory kill",
                0.8,
                "node-1",
                0,
                evidence,
                "restart on the same nodes from the last good checkpoint",
            ),
            120,
            seconds=0.1,
        )
        self.append(AttemptEnded(2, "failed"), 120)
        self.start(
            "1.02", 100, ("node-1", "node-3"), (), reason="killed: rank 0 on node-1", incident=2
        )
        self.append(IncidentClosed(2, "recovered", 20, 4.4 + 20 * STEP_SECONDS, 4.4), 101)
        self.append(Note("maria", "Rank 0 was me, sorry: wrong terminal."), 101, seconds=1.0)

    def finish(self) -> None:
        self.append(OrderGiven(1, "save", "the last step is near"), 199)
        self.append(OrderEnded(1, "obeyed"), 200)
        self.append(CheckpointRetired("checkpoints/1.00/step-00000050"), 200)
        loss = loss_at(200) + 0.12
        self.append(AttemptEnded(3, "finished"), 200)
        self.append(
            RunFinished(loss_at(200), math.exp(loss), 200 * TOKENS_PER_STEP, self.now - START), 200
        )

    def close(self) -> RunDirectory:
        self.metrics.close()
        self.journal.close()
        self.lock.release()
        return self.run


def loss_at(step: int) -> float:
    """A loss curve in nats a token, with a little deterministic roughness."""
    return 4.1 + 4.2 * math.exp(-step / 45) + 0.06 * math.sin(step * 1.7) * math.exp(-step / 300)


def metrics_line(step: int, now: float) -> Mapping[str, Any]:
    """One step's line as rank 0 tells it."""
    warm = min(1.0, step / 20)
    lr = 2e-3 * warm * (1 - 0.9 * max(0, step - 20) / 180)
    norm = 0.6 + 2.2 * math.exp(-step / 25) + 0.1 * math.sin(step * 2.3)
    return {
        "step": step,
        "updates": step,
        "samples": step * 16,
        "tokens": step * TOKENS_PER_STEP,
        "time": round(now, 3),
        "loss": loss_at(step),
        "lr": lr,
        "grad_norm": norm,
        "grad_norm_clipped": min(norm, 1.0),
        "activation_norm": 11.0,
        "loss_scale": None,
        "overflow": False,
        "skipped": False,
        "tokens_per_second": TOKENS_PER_STEP / STEP_SECONDS,
        "mfu": None,
        "step_seconds": STEP_SECONDS,
        "data_seconds": 0.01,
        "memory_bytes": 510_000_000,
    }


def write_demo(path: Path) -> RunDirectory:
    """The whole demo run at `path`."""
    demo = DemoRun(path)
    demo.create()
    demo.start("1.00", 0, NODES, ("node-3",), reason="the run begins")
    demo.train(2, 60)
    demo.lose_node()
    demo.train(52, 120)
    demo.lose_rank()
    demo.train(102, 200)
    demo.finish()
    run = demo.close()
    for name, line in (("logs/1.00/node-1/rank0.log", 41), ("logs/1.01/node-3/rank1.log", 57)):
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).write_text("step\n" * line)
    return run
