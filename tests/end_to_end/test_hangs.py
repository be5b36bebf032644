"""A rank that stops in any phase is found and its phase named; a checkpoint that is slow but moves
is left alone."""

import json
import os
import signal
from pathlib import Path

from tests.end_to_end import driving

QUICK = (
    "cluster.rank_module=tests.end_to_end.troubled_rank",
    "supervisor.minimum_seconds=5",
    "supervisor.step_seconds=8",
    "supervisor.checkpoint_seconds=8",
    "supervisor.evaluation_seconds=8",
)
"""Limits that a pause is quickly beyond, and that a disk which stalls for some seconds is not."""


def troubled(folder: Path, **trouble: object) -> dict[str, str]:
    markers = folder / "markers"
    markers.mkdir(parents=True)
    root = Path(__file__).parents[2]
    return {"TROUBLE": json.dumps({**trouble, "markers": str(markers)}), "PYTHONPATH": str(root)}


def test_a_stopped_rank_is_found_and_its_phase_named(tmp_path: Path) -> None:
    pauses = [(1, "data", 12), (0, "step", 22), (1, "checkpoint", 40), (0, "evaluation", 45)]
    # A save beside training has no phase of its own to stop in.
    more = ("train.validate_every=15", "checkpoint.asynchronous=false")
    process = driving.start(tmp_path, *QUICK, *more, environment=troubled(tmp_path, pauses=pauses))
    run = driving.run_directory(tmp_path)
    try:
        assert driving.finish(process, tmp_path, 200) == 0, driving.tail(tmp_path)
        seen = [entry.event for entry in driving.of_kind(run, "failure_seen")]
        diagnosed = [entry.event for entry in driving.of_kind(run, "incident_diagnosed")]
        assert [event.cause for event in diagnosed] == ["hang"] * len(pauses), diagnosed
        assert [event.rank for event in diagnosed] == [rank for rank, _, _ in pauses]
        for event, told, (rank, phase, _) in zip(seen, diagnosed, pauses, strict=True):
            assert f"in phase {phase} " in event.what, (
                f"rank {rank} stopped in {phase}, but: {event.what}"
            )
            assert told.blame == "unknown", "a hang by itself is nobody's fault"
    finally:
        driving.end(process, tmp_path)


def test_a_checkpoint_ten_times_longer_than_its_limit_is_left_alone_while_it_moves(
    tmp_path: Path,
) -> None:
    # Limits of 8 s before anything is learned: at 20 s, silence would have been punished twice
    # over; and it is far more than ten times the fraction of a second in which such a checkpoint is
    # normally written.
    process = driving.start(tmp_path, *QUICK, environment=troubled(tmp_path, slow_save=(30, 20)))
    run = driving.run_directory(tmp_path)
    try:
        assert driving.finish(process, tmp_path, 120) == 0, driving.tail(tmp_path)
        assert driving.of_kind(run, "failure_seen") == []
        times = {
            entry.step: entry.event.seconds
            for entry in driving.of_kind(run, "checkpoint_committed")
        }
        slow = times.pop(30)
        assert slow >= 20
        assert slow >= 10 * min(times.values())
    finally:
        driving.end(process, tmp_path)


def test_ranks_die_together_though_the_survivors_notice_nothing(tmp_path: Path) -> None:
    # As on NCCL: the survivor spins and would never end by itself.
    process = driving.start(
        tmp_path, *QUICK, "train.steps=100000", environment=troubled(tmp_path, deaf=True)
    )
    run = driving.run_directory(tmp_path)
    try:
        driving.wait_for(lambda: driving.newest_step(run) >= 12, 120, process, tmp_path)
        victim = driving.rank_process(tmp_path, rank=1)
        os.kill(victim, signal.SIGKILL)
        driving.wait_for(lambda: "incident_closed" in driving.kinds(run), 120, process, tmp_path)
        # No restart pays for an import: the ranks of the new attempt were there, warm, before the
        # old one failed.
        [failed] = driving.of_kind(run, "failure_seen")
        for rank in (0, 1):
            assert driving.started_at(driving.rank_process(tmp_path, rank)) < failed.time
        process.send_signal(signal.SIGINT)
        assert driving.finish(process, tmp_path, 60) == 75, driving.tail(tmp_path)
        [killed] = [entry.event for entry in driving.of_kind(run, "generation_killed")]
        assert killed.killed == 1, "the deaf survivor was not killed"
        [diagnosed] = [entry.event for entry in driving.of_kind(run, "incident_diagnosed")]
        assert (diagnosed.cause, diagnosed.rank) == ("killed", 1)
    finally:
        driving.end(process, tmp_path)
