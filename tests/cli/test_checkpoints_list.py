"""A list of checkpoints must not call good what a restart would refuse, nor hide what lies there,
nor change it."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from opt_logbook.record.events import (
    AttemptEnded,
    AttemptStarted,
    CheckpointCommitted,
    CheckpointRejected,
    CheckpointRetired,
    Entry,
    Event,
    LineageOpened,
    RunCreated,
    RunHalted,
    RunStopped,
    SaveAbandoned,
    TrainingBegan,
)
from opt_logbook.record.journal import Journal
from opt_logbook.record.lock import Lock
from opt_logbook.record.run_directory import RunDirectory

from opt_train.checkpoint.commit import build_manifest, commit_manifest, manifest_of_reports

START = 1_790_000_000.0


class Story:
    """A run that is made up: a journal, and folders of real checkpoints."""

    def __init__(self, path: Path) -> None:
        self.run = RunDirectory(path)
        self.run.path.mkdir()
        self.attempt = ""
        self.generation = 0
        self.now = START
        self._lock = Lock.acquire(self.run)
        self._journal = Journal.open(self.run, self._lock)
        self.tell(RunCreated("made-up", 0, "tiny", 1, 100, 1))
        self.tell(LineageOpened(1, "c0"))

    def tell(self, event: Event, step: int | None = None, attempt: str | None = None) -> None:
        self.now += 60.0
        self._journal.append(
            Entry(self.now, self.attempt if attempt is None else attempt, step, event)
        )

    def begin(self, attempt: str, parent: str = "", step: int = 0) -> None:
        if self.attempt:
            self.tell(AttemptEnded(self.generation, "failed"))
        self.attempt, self.generation = attempt, self.generation + 1
        taken = f"checkpoints/{parent}/step-{step:08d}" if parent else ""
        self.tell(AttemptStarted(self.generation, parent, taken, "", ("n0",), (), 1, "told"), step)
        self.tell(TrainingBegan(self.generation, 1.0), step + 1)

    def write(self, step: int) -> tuple[Path, dict[str, tuple[int, str]]]:
        folder = self.run.checkpoint(self.attempt, step)
        folder.mkdir(parents=True)
        files = {}
        state = json.dumps({"step": step, "healthy": step != 40}).encode()
        for name, content in (
            ("state.json", state),
            ("a.safetensors", bytes(1000)),
            ("b.safetensors", bytes(500)),
        ):
            (folder / name).write_bytes(content)
            files[name] = (len(content), hashlib.sha256(content).hexdigest())
        return folder, files

    def save(self, step: int) -> Path:
        folder, files = self.write(step)
        built = build_manifest(folder, self.attempt, step, files)
        sha256 = commit_manifest(folder, built)
        path = folder.relative_to(self.run.path).as_posix()
        self.tell(CheckpointCommitted(path, sha256, built.bytes, 3, 0.1, built.healthy), step)
        return folder

    def close(self) -> None:
        self._journal.close()
        self._lock.release()


@pytest.fixture
def story(tmp_path: Path) -> Story:
    """10, 20 and 30 in 1.00; 40 is not well; it goes on from 20 and saves 30 and 40 again in
    1.01."""
    story = Story(tmp_path / "run")
    story.begin("1.00")
    for step in (10, 20, 30):
        story.save(step)
    story.begin("1.01", "1.00", 20)
    story.save(30)
    story.save(40)
    return story


def listed(say: Any, story: Story, *flags: str) -> dict[tuple[str, int], dict[str, Any]]:
    story.close()
    said = say("checkpoints", str(story.run.path), "--json", *flags)
    rows = json.loads(said.out)
    assert said.code == (0 if any(row["next"] for row in rows) else 1)
    assert all(
        len(line) <= 100
        for line in say("checkpoints", str(story.run.path), *flags).out.splitlines()
    )
    return {(row["attempt"], row["step"]): row for row in rows}


def taken(rows: dict[tuple[str, int], dict[str, Any]]) -> list[tuple[str, int]]:
    return [place for place, row in rows.items() if row["next"]]


def test_each_checkpoint_is_on_its_branch_and_the_one_a_restart_takes_is_marked(
    story: Story, say
) -> None:
    rows = listed(say, story)
    assert list(rows) == [("1.00", 10), ("1.00", 20), ("1.00", 30), ("1.01", 30), ("1.01", 40)]
    branches = [row["branch"] for row in rows.values()]
    assert branches == ["live", "live", "abandoned", "live", "live"]
    assert [row["state"] for row in rows.values()] == ["good", "good", "abandoned", "good", "good"]
    assert taken(rows) == [("1.01", 30)], "40 was saved while training was not well"
    assert rows["1.01", 40]["healthy"] is False
    assert rows["1.00", 20]["referred"] == ["attempt 1.01 began with it"]
    assert {(row["tier"], row["checked"], row["files"], row["why"]) for row in rows.values()} == {
        ("shared", "listed", 3, "")
    }
    assert rows["1.00", 10]["committed"] == "2026-09-21T14:18:20.000Z"


def test_what_agents_hold_is_listed_by_tier_as_far_as_the_journal_counts_on_it(
    story: Story, say
) -> None:
    files = {"state.json": (10, "ab" * 32), "shard-00000.safetensors": (1000, "cd" * 32)}
    for tier, step in (("memory", 32), ("node", 34), ("memory", 34)):
        folder = story.run.checkpoint("1.01", step, tier)
        folder.mkdir(parents=True)
        made = manifest_of_reports("1.01", step, files, {"healthy": True})
        path = folder.relative_to(story.run.path).as_posix()
        sha256 = commit_manifest(folder, made)
        story.tell(CheckpointCommitted(path, sha256, made.bytes, 2, 0.1, True, tier, 1, "c0"), step)
    story.tell(
        CheckpointRejected("node/1.01/step-00000034", "node-1: shard-00000.safetensors is nowhere"),
        34,
    )
    rows = json.loads(say("checkpoints", str(story.run.path), "--json").out)
    held = [
        (row["tier"], row["step"], row["state"], row["checked"], row["next"])
        for row in rows
        if row["tier"] != "shared"
    ]
    assert held == [
        ("memory", 32, "good", "held", False),
        ("node", 34, "rejected", "held", False),
        ("memory", 34, "good", "held", True),
    ]
    # At rest nobody holds anything in memory any more, though the manifests lie there until the
    # next start.
    story.tell(RunStopped("a person", 30))
    rows = json.loads(say("checkpoints", str(story.run.path), "--json").out)
    assert [row["tier"] for row in rows if row["tier"] != "shared"] == ["node"]
    assert [(row["tier"], row["step"]) for row in rows if row["next"]] == [("shared", 30)]


def test_a_flipped_bit_is_found_by_verify_alone_and_moves_the_restart(story: Story, say) -> None:
    path = story.run.checkpoint("1.01", 30) / "b.safetensors"
    path.write_bytes(bytes(499) + b"\1")
    rows = listed(say, story)
    assert (rows["1.01", 30]["checked"], taken(rows)) == ("listed", [("1.01", 30)])
    rows = listed(say, story, "--verify")
    assert rows["1.01", 30]["checked"] == "bad"
    assert (
        rows["1.01", 30]["why"]
        == "checkpoints/1.01/step-00000030/b.safetensors has a wrong checksum"
    )
    assert taken(rows) == [("1.00", 20)]
    assert [row["checked"] for row in rows.values()].count("verified") == 4


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is not the manifest that was committed"),
        (b"[]", "is not the manifest that was committed"),
        (None, "manifest.json is missing"),
    ],
)
def test_a_damaged_manifest_is_said_in_a_sentence(
    story: Story, say, content: bytes | None, sentence: str
) -> None:
    path = story.run.checkpoint("1.01", 30) / "manifest.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    rows = listed(say, story)
    row = rows["1.01", 30]
    assert sentence in row["why"]
    assert (row["checked"], row["branch"], row["healthy"], taken(rows)) == (
        "bad",
        "live",
        None,
        [("1.00", 20)],
    )


@pytest.mark.parametrize(
    "content",
    [
        b"\xff",
        b"{",
        b"[" * 100_000,
        b"{}",
        b'{"version": 1}',
        b'{"version": 1, "files": 3}',
        b'{"version": 1, "attempt": "1.01", "step": 50, "state": {}, '
        b'"files": {"a": {"bytes": "1", "sha256": ""}}}',
        b'{"version": 1, "attempt": "1.01", "step": 50, "state": {}, '
        b'"files": {"../a": {"bytes": 1, "sha256": ""}}}',
        b'{"version": 1, "attempt": 7, "step": 50, "state": {}, '
        b'"files": {"a": {"bytes": 1, "sha256": ""}}}',
        b'{"version": 1, "attempt": "1.01", "step": 60, "state": {}, "files": {}}',
    ],
)
def test_nothing_that_lies_there_as_a_manifest_is_a_traceback(
    story: Story, say, content: bytes
) -> None:
    folder, _ = story.write(50)
    (folder / "manifest.json").write_bytes(content)
    row = listed(say, story)["1.01", 50]
    assert (row["state"], row["checked"], row["branch"], row["committed"]) == (
        "unknown",
        "bad",
        "",
        None,
    )
    assert str(story.run.path) not in row["why"]
    assert "\n" not in row["why"]


def test_what_is_no_checkpoint_says_what_it_is(story: Story, say) -> None:
    story.write(50)  # a rank died while it saved
    story.write(60)
    story.tell(
        SaveAbandoned("checkpoints/1.01/step-00000060", "rank 3: No space left on device"), 60
    )
    story.tell(CheckpointRetired("checkpoints/1.00/step-00000010"), 10, "1.00")
    folder, files = story.write(70)
    commit_manifest(
        folder, build_manifest(folder, "1.01", 70, files)
    )  # a supervisor died before it could say so
    shutil.rmtree(story.run.checkpoint("1.00", 30))
    rows = listed(say, story, "--verify")
    told = {
        place[1]: (row["state"], row["checked"])
        for place, row in rows.items()
        if row["state"] != "good"
    }
    assert told == {
        10: ("retired", "verified"),
        30: ("abandoned", "bad"),
        50: ("never committed", "-"),
        60: ("given up", "-"),
        70: ("unknown", "verified"),
    }
    assert "removal has not ended" in rows["1.00", 10]["why"]
    assert "its folder is gone" in rows["1.00", 30]["why"]
    assert rows["1.01", 60]["why"] == "rank 3: No space left on device"
    assert "journal knows no commit of it" in rows["1.01", 70]["why"]
    assert taken(rows) == [("1.01", 30)]


def test_a_rejected_one_is_not_taken_again_though_its_bytes_are_right_now(
    story: Story, say
) -> None:
    story.tell(CheckpointRejected("checkpoints/1.01/step-00000030", "Stale file handle"), 30)
    story.tell(
        CheckpointRejected("checkpoints/1.00/step-00000020", "Stale file handle"), 20, "1.00"
    )
    rows = listed(say, story, "--verify")
    assert (rows["1.01", 30]["state"], rows["1.01", 30]["why"]) == ("rejected", "Stale file handle")
    assert taken(rows) == [("1.00", 10)]


def test_exit_1_when_nothing_could_be_restored(story: Story, say) -> None:
    shutil.rmtree(story.run.checkpoints)
    rows = listed(say, story)
    assert (len(rows), taken(rows)) == (5, [])
    assert "none could be restored" in say("checkpoints", str(story.run.path)).out


def test_a_run_without_a_checkpoint_says_so(tmp_path: Path, say) -> None:
    story = Story(tmp_path / "run")
    story.begin("1.00")
    assert listed(say, story) == {}
    said = say("checkpoints", str(story.run.path))
    assert (said.code, said.out) == (1, "made-up has no checkpoint yet\n")


def test_a_save_under_way_is_not_told_as_rubbish(story: Story, say) -> None:
    story.write(50)
    row = json.loads(say("checkpoints", str(story.run.path), "--json").out)[-1]
    assert row["referred"] == ["attempt 1.01 still trains and may be saving it"]
    story.close()
    row = json.loads(say("checkpoints", str(story.run.path), "--json").out)[-1]
    assert row["referred"] == []


def test_the_checkpoint_of_a_stop_names_who_asked(story: Story, say) -> None:
    story.save(50)
    story.tell(AttemptEnded(2, "stopped"), 50)
    story.tell(RunStopped("ada on host", 50))
    assert listed(say, story)["1.01", 50]["referred"] == ["the stop asked by ada on host saved it"]


def test_listing_and_verifying_change_nothing(story: Story, say) -> None:
    story.close()

    def everything() -> list[tuple[str, int, int]]:
        paths = sorted(story.run.path.rglob("*"))
        return [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in paths]

    before = everything()
    for flags in ((), ("--verify",), ("--json",)):
        assert say("checkpoints", str(story.run.path), *flags).code == 0
    assert everything() == before


def test_progress_of_long_reading_goes_to_standard_error(
    story: Story, say, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opt_train.cli.progress.BYTES_SECONDS", 0.0)
    story.close()
    said = say("checkpoints", str(story.run.path), "--verify", "--json")
    assert json.loads(said.out)
    assert said.err.splitlines()[-1].startswith("verifying: 7.")
    assert said.err.splitlines()[-1].endswith("(100%)")


def test_after_a_halt_the_list_says_what_a_start_would_try_again(story: Story, say) -> None:
    for attempt, step in (("1.01", 40), ("1.01", 30), ("1.00", 20), ("1.00", 10)):
        path = f"checkpoints/{attempt}/step-{step:08d}"
        story.tell(CheckpointRejected(path, "Stale file handle"), step, attempt)
    story.tell(AttemptEnded(2, "failed"))
    story.tell(RunHalted("no checkpoint of this run verifies any more", "corrupt_checkpoint"))
    assert taken(listed(say, story, "--verify")) == [("1.01", 30)]
