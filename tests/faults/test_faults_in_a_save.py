"""Each call that a save makes to the file system fails once, or kills, and later all of them: what
is there stays good.

Which calls there are is counted in a save that nothing disturbs, so one that is added is tested
from then on.
"""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from opt_train.checkpoint import manifest as manifests
from opt_train.checkpoint.commit import retire_checkpoint
from opt_train.checkpoint.listing import list_checkpoints
from opt_train.checkpoint.manifest import MANIFEST
from tests.faults.saver import Saver, path_of
from tests.faults.shim import CHANGING, FILLING, KINDS, Fired, Rule, Shim, strerror

ERRORS = ("ENOSPC", "EDQUOT", "EIO", "ESTALE")
SHORT = ("ENOSPC", "EIO")
"""One of a full disk and one of a broken one. ESTALE, which is waited for, and the other come with
the slow tests."""
BEFORE, STEP, NEXT = 2, 4, 6
"""Steps of the checkpoint that is there, of the save that is disturbed, and of the one after it."""


class Run:
    """A run directory with one committed checkpoint, the process that saves into it, and what a
    save calls."""

    def __init__(self, folder: Path, shim: Shim, saver: Saver) -> None:
        self.folder, self.shim, self.saver = folder, shim, saver
        self.good = saver.do("save", BEFORE).sha256
        assert self.good
        self.calls = self.trace(KINDS)
        assert {call.call for call in self.calls} >= {
            "mkdir",
            "create",
            "write",
            "sync",
            "rename",
            "stat",
            "open",
            "read",
        }

    def trace(self, kinds: tuple[str, ...]) -> list[Fired]:
        """What a save that goes well calls."""
        self.clear()
        self.disturb(Rule("trace", self.everything, calls=kinds, times=0))
        assert self.saver.do("save", STEP).why == ""
        calls = self.shim.fired()
        assert calls
        self.clear()
        return calls

    @property
    def everything(self) -> str:
        return f"{self.folder}/checkpoints*"

    @property
    def there(self) -> Path:
        return self.folder / path_of(STEP)

    def disturb(self, rule: Rule) -> None:
        self.shim.set(rule)

    def clear(self) -> None:
        """As if `STEP` had never been saved."""
        self.shim.set()
        retire_checkpoint(self.there)

    def check_sentence(self, why: str, fault: str, stage: str) -> None:
        """One line that names a file and the system's reason."""
        assert strerror(fault) in why, f"{stage}: {why}"
        # The folder is in front of every sentence; the system's own words must say which file of
        # it.
        assert "checkpoints" in why.partition("[Errno")[2] or "cannot be read" in why, (
            f"{stage}: names no file: {why}"
        )
        assert "\n" not in why, stage

    def check(self) -> None:
        """What was committed before is good, nothing half counts, and the next save goes well."""
        self.shim.set()
        manifests.verify(self.folder / path_of(BEFORE), self.good)
        after = self.saver.do("save", NEXT)
        assert after.why == ""
        manifests.verify(self.folder / path_of(NEXT), after.sha256)
        retire_checkpoint(self.folder / path_of(NEXT))


@pytest.fixture(scope="module")
def run(fault_library: Path, quick_folder: Path) -> Iterator[Run]:
    shim = Shim(fault_library, quick_folder / "shim")
    (quick_folder / "run").mkdir()
    with Saver(quick_folder / "run", shim.environment) as saver:
        yield Run(quick_folder / "run", shim, saver)


def each_of(*faults: str) -> list[Any]:
    """Parameters; what is not of `SHORT` is slow."""
    return [
        pytest.param(fault, marks=[] if fault.rstrip("+") in SHORT else pytest.mark.slow)
        for fault in faults
    ]


def stages(calls: list[Fired], folder: Path) -> list[tuple[int, str]]:
    """Number of each call, and what it is, for a person."""
    return [
        (number, f"call {number}: {call.call} {call.path.removeprefix(str(folder))}")
        for number, call in enumerate(calls, 1)
    ]


@pytest.mark.parametrize("fault", each_of(*ERRORS, "EIO+", "ESTALE+"))
def test_a_call_that_fails_costs_that_save_at_most_and_says_why(run: Run, fault: str) -> None:
    """With a `+` behind it: the call is done, and its answer is lost."""
    abandoned = 0
    for number, stage in stages(run.calls, run.folder):
        run.clear()
        run.disturb(Rule(fault, run.everything, first=number))
        answer = run.saver.do("save", STEP)
        assert len(run.shim.fired()) == 1, stage
        if answer.why:
            abandoned += 1
            run.check_sentence(answer.why, fault, stage)
            assert not answer.left, f"{stage}: the space is not given back ({answer.why})"
            assert not run.there.exists(), f"{stage}: something is left ({answer.why})"
        else:
            manifests.verify(run.there, answer.sha256)
        manifests.verify(run.folder / path_of(BEFORE), run.good)
    assert abandoned > len(run.calls) // 2
    run.check()


@pytest.mark.parametrize(
    ("fault", "calls"),
    [
        ("ENOSPC", FILLING),
        pytest.param("EDQUOT", FILLING, marks=pytest.mark.slow),
        ("EIO", KINDS),
        pytest.param("ESTALE", KINDS, marks=pytest.mark.slow),
    ],
)
def test_from_any_call_on_all_fail_until_somebody_mends_it(
    run: Run, fault: str, calls: tuple[str, ...]
) -> None:
    """A full disk still lets files be removed, and looked at; a server that is gone lets nobody do
    anything."""
    for number, stage in stages(run.trace(calls), run.folder):
        run.clear()
        run.disturb(Rule(fault, run.everything, calls=calls, first=number, times=0))
        answer = run.saver.do("save", STEP)
        assert run.shim.fired(), stage
        if answer.why:
            run.check_sentence(answer.why, fault, stage)
            if calls == FILLING:
                assert not run.there.exists(), f"{stage}: a full disk is not given its space back"
        run.shim.set()
        if run.there.exists():  # not even removed: before the next attempt it is
            if (run.there / MANIFEST).exists():
                manifests.verify(run.there, answer.sha256 or None)
            run.saver.do("clear", BEFORE)
            assert not run.there.exists(), stage
        manifests.verify(run.folder / path_of(BEFORE), run.good)
    run.check()


@pytest.mark.parametrize(
    "calls",
    [
        pytest.param(("write",), id="write", marks=pytest.mark.slow),
        pytest.param(CHANGING, id="any change"),
    ],
)
def test_a_save_killed_at_any_call_leaves_the_one_before_and_nothing_half(
    run: Run, calls: tuple[str, ...]
) -> None:
    whole = 0
    for number, stage in stages(run.trace(calls), run.folder):
        run.clear()
        run.disturb(Rule("kill", run.everything, calls=calls, first=number))
        assert run.saver.do("save", STEP).signal == signal.SIGKILL, stage
        run.shim.set()
        listed = {item.step: item for item in list_checkpoints(run.folder / "checkpoints")}
        assert listed[BEFORE].why == "", stage
        if STEP in listed and listed[STEP].has_manifest:
            manifests.verify(run.there)
            whole += 1
        assert run.saver.do("verify", BEFORE, run.good).why == "", stage
        run.saver.do("clear", BEFORE)
        assert not run.there.exists(), stage
        again = run.saver.do("save", STEP)
        assert again.why == "", stage
        manifests.verify(run.there, again.sha256)
    assert whole <= 2, "between the rename and the end there are few calls"


def test_writes_that_take_less_than_they_are_given_change_nothing(run: Run) -> None:
    run.clear()
    whole = run.saver.do("save", STEP)
    run.clear()
    run.disturb(Rule("short", run.everything, calls=("write",), times=0))
    cut = run.saver.do("save", STEP)
    assert len(run.shim.fired()) > 3 * len([call for call in run.calls if call.call == "write"])
    assert (cut.why, cut.sha256) == ("", whole.sha256)


@pytest.mark.parametrize("fault", each_of(*ERRORS))
def test_any_mixture_of_faults_leaves_the_one_before(run: Run, fault: str) -> None:
    """Seeded: the same seed strikes the same calls."""
    outcomes = []
    for seed in (*range(12), *range(12)):
        run.clear()
        run.disturb(Rule(fault, run.everything, times=0, chance=40, seed=seed))
        answer = run.saver.do("save", STEP)
        struck = [(each.call, each.path) for each in run.shim.fired()]
        outcomes.append((answer.why, struck))
        run.shim.set()
        manifests.verify(run.folder / path_of(BEFORE), run.good)
        if (run.there / MANIFEST).exists():
            manifests.verify(run.there)
    assert outcomes[:12] == outcomes[12:]
    assert {bool(why) for why, _ in outcomes} == {True, False}
    run.check()


@pytest.mark.parametrize("fault", ["EIO", "EIO+"])
def test_a_commit_that_is_said_to_have_failed_has_made_no_checkpoint(run: Run, fault: str) -> None:
    """The rename may be done, and only its fsync fail: whoever finds the manifest would take it for
    good."""
    run.clear()
    report = run.saver.do("save-only", STEP).sha256
    run.disturb(Rule("trace", run.everything, times=0))
    assert run.saver.do("commit-only", STEP, report).why == ""
    calls = run.shim.fired()
    assert "rename" in {call.call for call in calls}
    for number, stage in stages(calls, run.folder):
        run.clear()
        assert run.saver.do("save-only", STEP).sha256 == report
        run.disturb(Rule(fault, run.everything, first=number))
        answer = run.saver.do("commit-only", STEP, report)
        assert len(run.shim.fired()) == 1, stage
        run.shim.set()
        if answer.why:
            names = {path.name for path in run.there.iterdir()}
            assert not any(name.startswith(MANIFEST) for name in names), f"{stage}: {names}"
            answer = run.saver.do("commit-only", STEP, report)
        manifests.verify(run.there, answer.sha256)
    run.clear()


@pytest.mark.parametrize("fault", each_of(*ERRORS))
def test_a_checkpoint_that_cannot_be_looked_at_is_not_taken_for_none(run: Run, fault: str) -> None:
    """Who saves over it would remove it."""
    run.disturb(Rule(fault, f"*/{MANIFEST}", ("stat",), times=0))
    assert strerror(fault) in run.saver.do("save-only", BEFORE).why
    assert run.shim.fired()
    run.shim.set()
    assert "is a committed checkpoint already" in run.saver.do("save-only", BEFORE).why
    manifests.verify(run.folder / path_of(BEFORE), run.good)
