"""A run directory that an earlier version made stays a run: it verifies, renders to the same bytes,
lists its checkpoints and goes on. `tests/data/run_of_154853f/README.md` says how it was made."""

import json
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from opt_logbook.cli import main as logbook
from opt_logbook.record import metrics
from opt_logbook.record.events import AttemptEnded, AttemptStarted, LineageOpened, RunFinished
from opt_logbook.record.journal import read
from opt_logbook.record.run_directory import RunDirectory

from opt_train.cli import main as cli
from tests.command import say_apart

KEPT = Path(__file__).parents[1] / "data" / "run_of_154853f"

ITS_CONFIGURATION = (
    "name=before",
    "model=tiny",
    "model.layers=1",
    "model.d_model=16",
    "model.heads=2",
    "model.ffn=32",
    "model.vocab_size=300",
    "model.positions=16",
    "data=files",
    "data.corpus=corpus",
    "data.validation_fraction=0.2",
    "data.sequence_length=16",
    "tokenizer.vocab_size=300",
    "precision=fp32",
    "optim.lr=3e-3",
    "optim.warmup_steps=2",
    "train.global_batch=8",
    "train.micro_batch=4",
    "train.threads=1",
    "train.validate_every=20",
)
ITS_CLUSTER = (
    "cluster.nodes=2",
    "cluster.buffer_nodes=1",
    "cluster.slots_per_node=1",
    "checkpoint.every_steps=10",
    "checkpoint.memory_every_steps=5",
    "checkpoint.keep=2",
)
LINES = 58
"""Of its journal."""

NEWEST = "checkpoints/1.02/step-00000040"

LOSSES_UNDER_ITS_OWN_CODE = {
    41: 4.576927185058594,
    42: 4.535762786865234,
    43: 4.501712322235107,
    44: 4.5399675369262695,
}
"""Of the steps that `opt-train train lineage=new train.steps=44` of 154853f went on with."""


def copy_to(folder: Path) -> RunDirectory:
    """The kept run as `runs/before` in `folder`."""
    run = RunDirectory(folder / "runs" / "before")
    shutil.copytree(KEPT / "run", run.path)
    return run


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return copy_to(tmp_path)


@pytest.fixture(scope="module")
def prepared_again(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run's corpus and, as `opt-train prepare` of today makes it, its data."""
    folder = tmp_path_factory.mktemp("kept")
    shutil.copytree(KEPT / "corpus", folder / "corpus")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["prepare", *ITS_CONFIGURATION]) == 0
    return folder


def test_it_verifies(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    assert logbook(["verify", str(run.path)]) == 0
    assert f"verified: {LINES} lines" in capsys.readouterr().out


def test_its_chronicle_is_the_same_text(run: RunDirectory) -> None:
    shutil.rmtree(run.chronicle)
    assert logbook(["render", str(run.path)]) == 0
    written = (run.chronicle / "chronicle.md").read_text()
    assert written == (KEPT / "run" / "chronicle" / "chronicle.md").read_text()


def test_its_page_and_figures_are_the_same_bytes(run: RunDirectory) -> None:
    drawn_with = next(
        line.partition("==")[2]
        for line in (run.path / "code" / "1" / "packages.txt").read_text().splitlines()
        if line.startswith("matplotlib==")
    )
    if metadata.version("matplotlib") != drawn_with:
        pytest.skip(f"the figures were drawn by matplotlib {drawn_with}; another lays out anew")
    shutil.rmtree(run.chronicle)
    assert logbook(["render", str(run.path)]) == 0
    kept = KEPT / "run" / "chronicle"
    names = {str(path.relative_to(kept)) for path in kept.rglob("*") if path.is_file()}
    assert names == {
        "index.html",
        "chronicle.md",
        "figures/steps.svg",
        "figures/validation.svg",
        "figures/wall_clock.svg",
    }
    for name in names:
        assert (run.chronicle / name).read_bytes() == (kept / name).read_bytes(), name


def test_its_checkpoints_are_listed_as_they_were(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["checkpoints", str(run.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(
        (KEPT / "checkpoints.json").read_text()
    )


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("train", ()), id="alone"),
        pytest.param(("run", ITS_CLUSTER), id="supervised", marks=pytest.mark.slow),
    ],
)
def gone_on(
    request: pytest.FixtureRequest, prepared_again: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunDirectory:
    """The run after four steps more, in a lineage of its own."""
    verb, nodes = request.param
    folder = tmp_path_factory.mktemp(verb)
    shutil.copytree(prepared_again, folder, dirs_exist_ok=True)
    run = copy_to(folder)
    done = say_apart(folder, verb, *ITS_CONFIGURATION, *nodes, "lineage=new", "train.steps=44")
    assert done.code == 0, done.out + done.err
    return run


def test_it_goes_on_from_its_newest_checkpoint(gone_on: RunDirectory) -> None:
    new = [entry for entry in read(gone_on.journal).entries if entry.seq > LINES]
    opened = next(e.event for e in new if isinstance(e.event, LineageOpened))
    assert opened.lineage == 2
    assert "train.steps: 40 -> 44" in opened.difference
    started = next(e.event for e in new if isinstance(e.event, AttemptStarted))
    assert (started.parent, started.checkpoint) == ("1.02", NEWEST)
    assert next(e.event for e in new if isinstance(e.event, AttemptEnded)).outcome == "finished"
    assert isinstance(new[-1].event, RunFinished)
    losses = {
        line["step"]: line["loss"]
        for line in metrics.read(gone_on).lines
        if line["attempt"] == "2.00"
    }
    # The same samples from the same state: another order of summation moves the last digits alone.
    assert losses == pytest.approx(LOSSES_UNDER_ITS_OWN_CODE, rel=1e-4)
    assert logbook(["verify", str(gone_on.path)]) == 0


def test_what_it_writes_then_has_the_keys_that_it_always_had(gone_on: RunDirectory) -> None:
    published = json.loads((KEPT.parent / "formats_of_154853f" / "files.json").read_text())
    first = json.loads(gone_on.metrics_of("2.00").read_text().splitlines()[0])
    checkpoint = gone_on.checkpoint("2.00", 44)
    written = {
        "metrics": first,
        "manifest.json": json.loads((checkpoint / "manifest.json").read_text()),
        "state.json": json.loads((checkpoint / "state.json").read_text()),
    }
    assert published.keys() == written.keys()
    for name, keys in published.items():
        assert [key for key in keys if not has(written[name], key)] == [], name
    assert written["manifest.json"]["state"] == written["state.json"]
    assert all(
        entry.keys() >= {"bytes", "sha256"} for entry in written["manifest.json"]["files"].values()
    )


def has(payload: Mapping[str, Any], key: str) -> bool:
    """Whether `payload` has `key`; a dot goes into an object."""
    value: Any = payload
    for name in key.split("."):
        if not isinstance(value, dict) or name not in value:
            return False
        value = value[name]
    return True
