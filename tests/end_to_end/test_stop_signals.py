"""What schedulers send: SIGTERM and SIGUSR1 to every process of a job that they find, at any time,
and then SIGKILL."""

import os
import signal
import time
from pathlib import Path

from tests.end_to_end import driving
from tests.end_to_end.test_hangs import troubled

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
TIERS = (
    "checkpoint.memory_every_steps=5",
    "checkpoint.node_every_steps=1000",
    "checkpoint.every_steps=100000",
)


STEP_SECONDS, PROMPT_SECONDS = 0.2, 3.0

PROCESSES = 3 * 2 + 1
"""Three agents, a rank each, and a sink."""


def send_to_all(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def is_gpu_probe(pid: int) -> bool:
    """One that ends by itself where there is no GPU."""
    try:
        return b"opt_train.agent.probes.gpu" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def test_helpers_do_not_mind_them_from_birth_and_the_ranks_agree_to_stop(tmp_path: Path) -> None:
    # At every step, so that they stop at one whose snapshot was begun before anybody knew of it.
    more = ("checkpoint.memory_every_steps=1", "train.steps=100000", "sinks.tensorboard=true")
    process = driving.start(tmp_path, *TIERS, *more)
    run = driving.run_directory(tmp_path)
    try:
        # All but the supervisor, which stops for them; each from the first moment in which it can
        # be seen.
        hit: set[int] = set()
        probes: set[int] = set()
        driving.wait_for(run.journal.exists, 60, process, tmp_path)
        deadline = time.monotonic() + 60
        all_there = float("inf")
        # Not so long that a rank begins to train meanwhile: it would answer. To import torch takes
        # it longer.
        while time.monotonic() < all_there + 0.5:
            assert process.poll() is None, driving.tail(tmp_path)
            assert time.monotonic() < deadline, driving.tail(tmp_path)
            pids = [pid for pid in driving.processes_of(tmp_path) if pid != process.pid]
            # One that has just been forked has still the command line of its agent.
            probes |= {pid for pid in pids if is_gpu_probe(pid)}
            hit = (hit | set(pids)) - probes
            if len(hit) >= PROCESSES:
                all_there = min(all_there, time.monotonic())
            for number in SIGNALS:
                send_to_all(pids, number)
            time.sleep(0.005)
        driving.wait_for(lambda: driving.newest_step(run) >= 12, 120, process, tmp_path)
        assert hit <= set(driving.processes_of(tmp_path)), (
            "a helper was ended by a signal that asks to stop"
        )
        assert driving.of_kind(run, "failure_seen") == []

        # As `scancel` does: everybody, the ranks too, at whatever boundary each of them is.
        send_to_all(driving.processes_of(tmp_path), signal.SIGUSR1)
        assert driving.finish(process, tmp_path, 90) == 75, driving.tail(tmp_path)
        (stopped,) = [entry.event for entry in driving.of_kind(run, "run_stopped")]
        saved = [
            e.event.tier
            for e in driving.of_kind(run, "checkpoint_committed")
            if e.step == stopped.saved_step
        ]
        assert sorted(saved) == ["memory", "node", "shared"]
        assert driving.of_kind(run, "failure_seen") == []
        last = {taken.rank: taken.step for taken in driving.steps_taken(run)}
        assert set(last.values()) == {stopped.saved_step}, "the ranks stopped at one boundary"
        assert driving.processes_of(tmp_path) == []
    finally:
        driving.end(process, tmp_path)


def test_a_grace_too_short_for_the_file_system_is_long_enough_for_the_nodes_disks(
    tmp_path: Path,
) -> None:
    arguments = (
        *TIERS,
        f"checkpoint.node_directory={tmp_path / 'disk'}",
        "train.steps=100000",
        "cluster.rank_module=tests.end_to_end.troubled_rank",
    )
    trouble = troubled(tmp_path, slow_save=(None, 60), rests=STEP_SECONDS)
    process = driving.start(tmp_path, *arguments, environment=trouble)
    run = driving.run_directory(tmp_path)
    try:
        driving.wait_for(lambda: driving.newest_step(run) >= 12, 120, process, tmp_path)
        asked = driving.newest_step(run)
        send_to_all(driving.processes_of(tmp_path), signal.SIGTERM)

        def on_disk() -> list[int | None]:
            found = driving.of_kind(run, "checkpoint_committed")
            return [entry.step for entry in found if entry.event.tier == "node"]

        driving.wait_for(lambda: on_disk() != [], 30, process, tmp_path)
        (step,) = on_disk()
        assert step is not None
        assert asked <= step <= asked + PROMPT_SECONDS / STEP_SECONDS, (
            "at the next boundary, but for what the machine took to pass the signal on"
        )
        assert not [
            e for e in driving.of_kind(run, "checkpoint_committed") if e.event.tier == "shared"
        ]
        # The grace is over.
        process.kill()
        driving.end(process, tmp_path)
        markers = tmp_path / "markers"
        assert {path.name for path in markers.iterdir()} == {"slow0", "slow1"}, (
            "the saves had begun"
        )

        environment = {
            "TROUBLE": f'{{"markers": "{markers}"}}',
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        process = driving.start(tmp_path, *arguments, environment=environment)
        driving.wait_for(
            lambda: driving.kinds(run).count("training_began") == 2, 120, process, tmp_path
        )
        restart = driving.of_kind(run, "attempt_started")[-1]
        assert restart.event.checkpoint == f"node/1.00/step-{step:08d}"
        process.send_signal(signal.SIGTERM)
        driving.finish(process, tmp_path, 90)
    finally:
        driving.end(process, tmp_path)
