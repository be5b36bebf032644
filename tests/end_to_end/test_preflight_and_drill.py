"""One real run: a buffer node computes a wrong bit and is found before it is needed, a preflight of
the run's own name disturbs nothing, and a drill kills a node and tells what came of it."""

import json
import subprocess
from pathlib import Path

from opt_logbook.record.verify import verify

from tests.burn_in.corruption import corrupt
from tests.end_to_end import driving

QUICK = (
    *("burn_in.matmul_size=128", "burn_in.matmul_seconds=0.1", "burn_in.pair_rounds=0"),
    *("burn_in.host_memory_bytes=1000000", "burn_in.file_bytes=1000000"),
)


def say(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        driving.command(*words), capture_output=True, text=True, check=False, timeout=300
    )


def test_a_bad_buffer_node_is_found_and_a_drill_is_answered(tmp_path: Path) -> None:
    run = driving.run_directory(tmp_path)
    process = driving.start(
        tmp_path,
        *QUICK,
        "cluster.buffer_nodes=2",
        "burn_in.on_arrival=true",
        *driving.ENDLESS,
        environment=corrupt(tmp_path / "site", "node-3"),
    )
    try:
        driving.wait_for(lambda: bool(driving.of_kind(run, "node_failed")), 120, process, tmp_path)
        [noted] = [entry.event for entry in driving.of_kind(run, "finding_noted")]
        assert (noted.node, noted.cause) == ("node-3", "silent_corruption")
        [out] = [entry.event for entry in driving.of_kind(run, "node_failed")]
        assert (out.node, out.incident) == ("node-3", 0)
        driving.wait_for(
            lambda: bool(driving.of_kind(run, "checkpoint_committed")), 120, process, tmp_path
        )
        assert driving.of_kind(run, "failure_seen") == []

        one_node = ("cluster.nodes=1", "cluster.buffer_nodes=0", f"runs={tmp_path / 'runs'}")
        said = say("preflight", *driving.TINY, *QUICK, *one_node, "name=run")
        assert (said.returncode, said.stdout.splitlines()[-1]) == (0, "1 nodes, all well")
        assert driving.of_kind(run, "failure_seen") == []

        planned = say("drill", str(run.path), "--dry-run")
        assert (planned.returncode, "node-2 of run is killed" in planned.stdout) == (0, True)
        said = say("drill", str(run.path), "--json", "--seconds", "120")
        assert said.returncode == 0, said.stdout + said.stderr
        outcome = json.loads(said.stdout)
        assert (outcome["node"], outcome["buffer_node"]) == ("node-2", "node-4")
        assert outcome["cause"] == "node_failure"
        assert 0 < outcome["detected_seconds"] < outcome["training_seconds"] < 60
        assert outcome["steps_lost"] >= 0
        notes = [entry.event.text for entry in driving.of_kind(run, "note")]
        assert [note.startswith("drill: node-2 is killed on purpose, by ") for note in notes] == [
            True
        ]
        again = say("drill", str(run.path))
        assert (again.returncode, "no buffer node" in again.stderr) == (2, True)
        assert say("stop", str(run.path)).returncode == 0
        assert driving.finish(process, tmp_path, 120) == 75
    finally:
        driving.end(process, tmp_path)
    assert verify(run) == []
