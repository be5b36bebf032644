"""What becomes of a save that failed on another rank, or that a lone rank could not commit."""

from pathlib import Path

from opt_logbook.record.journal import read

from opt_train.config.compose import compose
from tests.command import prepared_once, workplace  # noqa: F401 - fixtures
from tests.run.test_standalone import SMALL, a_standalone_run, save
from tests.train.rig import run_at_once


def test_what_a_lone_rank_cannot_commit_gives_its_space_back(workplace: Path) -> None:  # noqa: F811
    standalone, run = a_standalone_run(compose(SMALL))
    attempt = standalone.open().attempt
    save(standalone, run, attempt, 4, missing_bytes=1)
    assert not run.checkpoint(attempt, 4).exists()
    save(standalone, run, attempt, 8)
    standalone.close()
    told = {entry.step: entry.event for entry in read(run.journal).entries if entry.step in (4, 8)}
    assert [event.kind for event in told.values()] == ["save_abandoned", "checkpoint_committed"]
    assert "bytes instead of" in getattr(told[4], "why", "")


def test_every_rank_knows_why_another_one_could_not_save(tmp_path: Path) -> None:
    """The journal takes the word of the rank that is heard first, and "another rank failed" is no
    reason."""
    program = ("-m", "tests.faults.agreeing_ranks")
    said = run_at_once([[*program, str(rank), str(tmp_path)] for rank in range(2)])
    reason = "[Errno 28] No space left on device: 'shard-00002'"
    assert said == [f"it was not saved: rank 1: {reason}\n", f"it was not saved: {reason}\n"]
