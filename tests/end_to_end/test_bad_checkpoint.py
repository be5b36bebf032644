"""The newest checkpoint is corrupt when it is needed: it is rejected on record and the one before
is restored."""

import signal
from pathlib import Path

from tests.end_to_end import driving


def test_a_corrupt_newest_checkpoint_is_rejected_and_the_one_before_restored(
    tmp_path: Path,
) -> None:
    process = driving.start(tmp_path, *driving.ENDLESS)
    run = driving.run_directory(tmp_path)
    try:
        driving.wait_for(
            lambda: len(driving.of_kind(run, "checkpoint_committed")) >= 2, 120, process, tmp_path
        )
        process.send_signal(signal.SIGINT)
        assert driving.finish(process, tmp_path, 60) == 75, driving.tail(tmp_path)

        committed = driving.of_kind(run, "checkpoint_committed")
        newest, before = run.path / committed[-1].event.path, committed[-2]
        shard = max(newest.glob("*.safetensors"), key=lambda path: path.stat().st_size)
        with shard.open("r+b") as file:
            file.seek(shard.stat().st_size // 2)
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 1]))

        process = driving.start(tmp_path, *driving.ENDLESS)
        driving.wait_for(
            lambda: driving.kinds(run).count("training_began") == 2, 120, process, tmp_path
        )
        process.send_signal(signal.SIGINT)
        assert driving.finish(process, tmp_path, 60) == 75, driving.tail(tmp_path)
        [rejected] = driving.of_kind(run, "checkpoint_rejected")
        assert rejected.event.path == committed[-1].event.path
        # A rank found it, and nobody else had read it: the attempt that began with it never
        # trained, and no node is the worse for it.
        assert f"a rank could not restore it: {newest} cannot be" in rejected.event.why
        assert f"{shard.name} has a wrong checksum" in rejected.event.why
        starts = [entry.event.checkpoint for entry in driving.of_kind(run, "attempt_started")]
        assert starts == ["", committed[-1].event.path, before.event.path]
        [diagnosed] = driving.of_kind(run, "incident_diagnosed")
        assert (diagnosed.event.cause, diagnosed.event.blame) == ("corrupt_checkpoint", "storage")
        assert driving.of_kind(run, "node_failed") == []
        restarted = driving.of_kind(run, "attempt_started")[-1]
        assert (restarted.event.checkpoint, restarted.step) == (before.event.path, before.step)
        assert committed[-1].event.path in (run.chronicle / "chronicle.md").read_text()
    finally:
        driving.end(process, tmp_path)
