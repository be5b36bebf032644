"""A run that goes on under other code than it began with is two experiments told as one: where the
installation is what trains, it is refused like a changed training key. Run 12.47 of OPT-175B
trained with a dependency that somebody had upgraded by accident."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from opt_logbook.record.events import AttemptStarted, LineageOpened
from opt_logbook.record.journal import read
from opt_logbook.record.run_directory import RunDirectory

import opt_train
from opt_train.config.compose import compose
from opt_train.run import lineage
from opt_train.run.code.code_state import package_versions
from tests import command

SMALL = (
    *command.SMALL,
    "train.steps=6",
    "supervisor.orphan_seconds=4",
    "cluster.code=installed",
)

STEP = "opt_train/train/step.py"
"""A file that decides what is computed."""


@pytest.fixture(scope="module")
def finished_once(prepared_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run, in a workplace of its own: others copy the prepared one as
    it is."""
    folder = tmp_path_factory.mktemp("finished") / "workplace"
    shutil.copytree(prepared_once, folder)
    done = command.say_apart(folder, "train", *SMALL)
    assert done.code == 0, done.err
    return folder / "runs" / "small"


@pytest.fixture
def finished(workplace: Path, finished_once: Path) -> RunDirectory:
    """A copy of it in the working directory."""
    run = RunDirectory(workplace / "runs" / "small")
    shutil.copytree(finished_once, run.path)
    return run


@pytest.fixture
def broken_off(finished: RunDirectory) -> RunDirectory:
    """The same, as if it had been cut off after its first checkpoint."""
    lines = finished.journal.read_bytes().splitlines(keepends=True)
    [first, *_] = [k for k, line in enumerate(lines) if b'"kind":"checkpoint_committed"' in line]
    finished.journal.write_bytes(b"".join(lines[: first + 1]))
    finished.head.unlink()
    return finished


def edit(file: Path, change: Callable[[str], str]) -> None:
    """Change what the run keeps: to the comparison that is as if the installed code had been."""
    text = file.read_text()
    assert change(text) != text
    file.write_text(change(text))


def an_edit(run: RunDirectory) -> str:
    edit(run.path / "code" / "1" / STEP, lambda text: text + "# as it was\n")
    return f"code: {STEP} changed"


def an_upgrade(run: RunDirectory) -> str:
    now = package_versions()["torch"]
    edit(
        run.path / "code" / "1" / "packages.txt",
        lambda text: text.replace(f"torch=={now}\n", "torch==2.12.0\n"),
    )
    return f"torch: 2.12.0 -> {now}"


def a_package_that_was_not_there(run: RunDirectory) -> str:
    now = package_versions()["safetensors"]
    edit(
        run.path / "code" / "1" / "packages.txt",
        lambda text: text.replace(f"safetensors=={now}\n", ""),
    )
    return f"safetensors: absent -> {now}"


def a_new_file_of_the_logbook(run: RunDirectory) -> str:
    (run.path / "code" / "1" / "opt_logbook" / "record" / "codec.py").unlink()
    return "code: opt_logbook/record/codec.py new"


def a_file_that_is_gone(run: RunDirectory) -> str:
    (run.path / "code" / "1" / "opt_train" / "optim" / "sgd.py").write_text("lr = 1\n")
    return "code: opt_train/optim/sgd.py gone"


CHANGES = [
    an_edit,
    an_upgrade,
    a_package_that_was_not_there,
    a_new_file_of_the_logbook,
    a_file_that_is_gone,
]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refusal(run: RunDirectory, difference: str) -> str:
    return (
        f"opt-train: {run.path} was trained with other code ({difference}); "
        "add lineage=new to go on from its newest checkpoint with this code, or choose another "
        "name=\n"
    )


@pytest.mark.parametrize("change", CHANGES)
def test_other_code_is_refused_and_named_by_both_verbs(
    change, broken_off: RunDirectory, say
) -> None:
    difference = change(broken_off)
    before = contents(broken_off.path)
    for verb in ("run", "train"):
        said = say(verb, *SMALL)
        assert (said.code, said.out, said.err) == (2, "", refusal(broken_off, difference))
    assert contents(broken_off.path) == before


def test_many_changed_files_are_counted_and_versions_come_first(
    broken_off: RunDirectory, say
) -> None:
    """An upgrade of the whole package must not bury the one line that matters under a hundred
    names."""
    upgrade = an_upgrade(broken_off)
    files = sorted((broken_off.path / "code" / "1" / "opt_train" / "optim").glob("[a-z]*.py"))
    for file in files:
        edit(file, lambda text: text + "\n")
    told = [f"code: opt_train/optim/{file.name} changed" for file in files[:3]]
    assert len(files) > 4
    expected = "; ".join([upgrade, *told, f"code: and {len(files) - 3} more"])
    assert say("run", *SMALL).err == refusal(broken_off, expected)


def test_a_changed_key_and_changed_code_are_told_together(broken_off: RunDirectory, say) -> None:
    difference = an_edit(broken_off)
    assert say("run", *SMALL, "optim.lr=1e-3").err == (
        f"opt-train: {broken_off.path} was trained with another configuration (optim.lr: 0.0006 "
        "-> 0.001; "
        f"{difference}); add lineage=new to go on from its newest checkpoint with this one, or "
        "choose another name=\n"
    )


def test_a_crash_before_the_lineage_is_journalled_does_not_pass_for_consent(
    broken_off: RunDirectory, say
) -> None:
    """The new code lay in the run directory already when the machine died."""
    difference = an_edit(broken_off)
    directory, resolved = lineage.resolve(compose(SMALL))
    start = lineage.classify_start(directory, resolved, asked_for_lineage=True)
    lineage.write_configuration(directory, resolved, start)
    assert (broken_off.path / "code" / "2" / STEP).exists()
    assert say("run", *SMALL).err == refusal(broken_off, difference)


def test_what_decides_nothing_may_change(broken_off: RunDirectory) -> None:
    """Compiled files, what a wheel carries along, and the rest of the environment are no reason to
    refuse."""
    code = broken_off.path / "code" / "1"
    (code / "opt_train" / "configs").mkdir()
    (code / "opt_train" / "configs" / "config.yaml").write_text("name: wheel\n")
    (code / "opt_train" / "__pycache__").mkdir()
    (code / "opt_train" / "__pycache__" / "cli.cpython-311.pyc").write_bytes(b"\0")
    edit(code / "packages.txt", lambda text: "# Python 3.11.0\nzzz==1.0\n" + text.split("\n", 1)[1])
    directory, resolved = lineage.resolve(compose(SMALL))
    start = lineage.classify_start(directory, resolved, asked_for_lineage=False)
    assert (start.lineage, start.opens_lineage, start.lineage_difference, start.is_new) == (
        1,
        False,
        (),
        False,
    )
    # Asking for a lineage where nothing is new opens none.
    assert lineage.classify_start(directory, resolved, asked_for_lineage=True) == start


def test_a_copy_that_cannot_be_read_is_named(broken_off: RunDirectory, say) -> None:
    (broken_off.path / "code" / "1" / "packages.txt").unlink()
    said = say("run", *SMALL)
    assert (said.code, len(said.err.splitlines())) == (2, 1)
    assert said.err.startswith(f"opt-train: {broken_off.path}/code/1 cannot be read (")
    assert "packages.txt" in said.err


def test_a_finished_run_prints_its_summary_whatever_is_installed(
    finished: RunDirectory, say
) -> None:
    an_edit(finished)
    an_upgrade(finished)
    before = contents(finished.path)
    for words in (("run", *SMALL), ("train", *SMALL), ("run", *SMALL, "lineage=new")):
        said = say(*words)
        assert (said.code, said.err) == (0, "")
        assert said.out.startswith("small: finished\n")
    assert contents(finished.path) == before


@pytest.mark.parametrize("verb", ["run", "train"])
def test_a_new_lineage_goes_on_with_the_new_code(
    verb: str, broken_off: RunDirectory, workplace: Path
) -> None:
    difference = an_edit(broken_off)
    done = command.say_apart(workplace, verb, *SMALL, "lineage=new")
    assert done.code == 0, done.err
    entries = read(broken_off.journal).entries
    opened = [entry.event for entry in entries if isinstance(entry.event, LineageOpened)]
    assert [(event.lineage, event.difference) for event in opened] == [(1, ()), (2, (difference,))]
    starts = [(e.attempt, e.step) for e in entries if isinstance(e.event, AttemptStarted)]
    assert starts == [("1.00", 0), ("2.00", 4)]
    kept = (broken_off.path / "code" / "2" / STEP).read_bytes()
    assert kept == (Path(opt_train.__path__[0]) / "train" / "step.py").read_bytes()
    # From now on this is the code of the run, for either verb.
    again = command.say_apart(workplace, verb, *SMALL)
    assert (again.code, again.err) == (0, "")
