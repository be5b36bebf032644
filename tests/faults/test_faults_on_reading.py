"""What a restart meets: a file system that fails while it reads, a name that is late, two that
saved at once."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from opt_train.checkpoint import manifest as manifests
from opt_train.checkpoint.commit import retire_checkpoint
from opt_train.checkpoint.manifest import MANIFEST
from tests.faults.saver import Case, Saver, path_of
from tests.faults.shim import Fired, Rule, Shim, strerror

STEP = 4
LATE_SECONDS = 1.5


class Reader:
    """A run directory with a committed checkpoint, and a process that reads it through the shim."""

    def __init__(self, folder: Path, shim: Shim, saver: Saver) -> None:
        self.folder, self.shim, self.saver = folder, shim, saver
        self.good = saver.do("save", STEP).sha256
        self.everything = f"{folder}/checkpoints*"

    def calls(self, deed: str) -> list[Fired]:
        """What it calls when nothing disturbs it."""
        self.shim.set(Rule("trace", self.everything, times=0))
        assert self.saver.do(deed, STEP, self.good).why == ""
        return self.shim.fired()


@pytest.fixture(scope="module")
def reader(fault_library: Path, quick_folder: Path) -> Iterator[Reader]:
    shim = Shim(fault_library, quick_folder / "shim")
    (quick_folder / "run").mkdir()
    with Saver(quick_folder / "run", shim.environment) as saver:
        yield Reader(quick_folder / "run", shim, saver)


@pytest.mark.parametrize("deed", ["verify", "restore"])
def test_a_read_that_fails_is_a_sentence_and_never_half_a_state(reader: Reader, deed: str) -> None:
    calls = reader.calls(deed)
    assert {call.call for call in calls} >= {"open", "read", "stat"}
    refused = 0
    for number, call in enumerate(calls, 1):
        stage = f"call {number}: {call.call} {call.path}"
        reader.shim.set(Rule("EIO", reader.everything, first=number))
        answer = reader.saver.do(deed, STEP, reader.good)
        assert len(reader.shim.fired()) == 1, stage
        if answer.why:  # some calls are made beside what is needed
            refused += 1
            assert strerror("EIO") in answer.why or "No such file" in answer.why, (
                f"{stage}: {answer.why}"
            )
            assert path_of(STEP) in answer.why, f"{stage}: {answer.why}"
            assert "\n" not in answer.why, stage
    # Of those without need, half of what the supervisor calls, most look for where the folder is.
    assert refused >= len(calls) // 2
    reader.shim.set()
    assert reader.saver.do(deed, STEP, reader.good).why == ""


def test_a_stale_handle_is_asked_for_again(reader: Reader) -> None:
    """ESTALE says that what the client remembered is gone, not that the file is: a good checkpoint
    is not given up."""
    for call in ("open", "read"):
        reader.shim.set(Rule("ESTALE", f"{reader.folder}/*.safetensors", calls=(call,)))
        assert reader.saver.do("restore", STEP, reader.good).why == ""
        assert [fired.call for fired in reader.shim.fired()] == [call]


def test_a_stale_handle_that_the_supervisor_meets_is_asked_for_again(reader: Reader) -> None:
    """It opens the manifest and looks at the files, and opens no shard."""
    assert not [c for c in reader.calls("verify") if c.call == "open" and "shard" in c.path]
    for call, name in (("open", MANIFEST), ("read", MANIFEST), ("stat", "shard*")):
        reader.shim.set(Rule("ESTALE", f"{reader.folder}/*/{name}", calls=(call,)))
        assert reader.saver.do("verify", STEP, reader.good).why == ""
        assert [fired.call for fired in reader.shim.fired()] == [call]


def test_a_manifest_that_other_nodes_see_late_is_waited_for(reader: Reader) -> None:
    manifest = f"{reader.folder}/{path_of(8)}/{MANIFEST}"
    reader.shim.set(Rule("late", manifest, calls=("rename",), seconds=LATE_SECONDS))
    saved = reader.saver.do("save", 8)
    assert saved.why == ""
    began = time.monotonic()
    assert reader.saver.do("verify", 8, saved.sha256).why == ""
    assert time.monotonic() - began >= LATE_SECONDS / 2
    assert [fired.fault for fired in reader.shim.fired()][:2] == ["late", "late"], (
        "renamed, and not seen"
    )


def test_what_is_not_there_at_all_is_not_waited_for(reader: Reader) -> None:
    """A person has moved it away to begin with an older one."""
    began = time.monotonic()
    assert "manifest.json is missing" in reader.saver.do("verify", 12, reader.good).why
    assert time.monotonic() - began < 5


def test_of_two_that_save_at_once_one_commits_and_what_it_commits_is_its_own(
    shim: Shim, tmp_path: Path
) -> None:
    """One stands still at each of its calls in turn, while the other makes the folder anew, saves
    and commits.

    On a real disk, which gives the number of a folder that was removed to the next one.
    """
    run = tmp_path / "run"
    run.mkdir()
    folder = run / path_of(STEP)
    with (
        Saver(run, {}) as quick,
        Saver(tmp_path / "lock", shim.environment | {"SAVES_INTO": str(run)}) as slow,
    ):
        shim.set(Rule("trace", f"{folder}*", times=0))
        assert slow.do("save-only", STEP, value=2.0).why == ""
        calls = shim.fired()
        prepared = max(
            number
            for number, call in enumerate(calls, 1)
            if (call.call, call.path) == ("mkdir", str(folder))
        )
        for number in range(prepared, len(calls) + 2):
            stage = f"call {number} of {len(calls)}"
            retire_checkpoint(folder)
            shim.set(Rule("stall", f"{folder}*", first=number, seconds=60))
            slow.begin(Case("save-only", STEP, 2.0))
            deadline = time.monotonic() + 30
            while number <= len(calls) and not shim.fired():
                assert time.monotonic() < deadline, stage
            other = None if number <= len(calls) else slow.end()
            won = quick.do("save", STEP)
            assert won.why == "", stage
            shim.set()  # now it goes on
            other = other or slow.end()
            if other.why:
                assert folder.name in other.why, stage
            else:  # it had reported before its folder was taken away
                assert quick.do("commit-only", STEP, other.sha256).why, f"{stage}: committed twice"
            manifests.verify(folder, won.sha256)


def test_a_shard_that_nobody_reported_keeps_a_save_from_being_committed(reader: Reader) -> None:
    """A rank of another save wrote it: the reader takes every shard it finds, so what is committed
    would not verify."""
    reader.shim.set()
    report = reader.saver.do("save-only", 20).sha256
    (reader.folder / path_of(20) / "shard-00009-model-00001-of-00001.safetensors").touch()
    assert (
        "shard-00009-model-00001-of-00001.safetensors is not"
        in reader.saver.do("commit-only", 20, report).why
    )
