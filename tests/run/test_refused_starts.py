"""Starts that a run refuses, in one sentence: another configuration, other data, no room, a folder
of somebody else."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from opt_logbook.record.events import Entry, LineageOpened
from opt_logbook.record.journal import Journal
from opt_logbook.record.lock import Lock

from opt_train.cli import jobs
from opt_train.cli import run as cli_run
from opt_train.config.compose import compose
from opt_train.config.run_config import sha256_of
from opt_train.data.manifest import DatasetManifest
from opt_train.protocol.exits import BadInput
from opt_train.run import lineage
from opt_train.run.entries import run_created
from tests.command import SMALL


@pytest.fixture
def begun(workplace: Path) -> Path:
    """A run directory that a supervisor has begun, of the configuration `SMALL`."""
    directory, resolved = lineage.resolve(compose(SMALL))
    start = lineage.classify_start(directory, resolved, asked_for_lineage=False)
    data = DatasetManifest.read(Path(resolved.data.directory))
    directory.path.mkdir(parents=True)
    with Lock.acquire(directory) as lock, Journal.open(directory, lock) as journal:
        lineage.write_configuration(directory, resolved, start)
        journal.append(Entry(1.0, "", None, run_created(resolved, data)))
        journal.append(Entry(2.0, "", None, LineageOpened(1, sha256_of(resolved))))
    return directory.path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_run_of_another_configuration_is_refused_with_the_differences(begun: Path, say) -> None:
    before = contents(begun)
    said = say("run", *SMALL, "optim.lr=1e-3", "precision=bf16", "checkpoint.keep=9")
    assert (said.code, said.err) == (
        2,
        f"opt-train: {begun} was trained with another configuration "
        "(precision.compute: fp32 -> bf16; optim.lr: 0.0006 -> 0.001); "
        "add lineage=new to go on from its newest checkpoint with this one, or choose another "
        "name=\n",
    )
    assert contents(begun) == before


@pytest.mark.parametrize("asked", [(), ("lineage=new",)])
@pytest.mark.parametrize("key", ["model.layers=4", "train.global_batch=8", "data.max_bytes=9000"])
def test_what_checkpoints_stand_on_cannot_change_even_in_a_new_lineage(
    begun: Path, say, key: str, asked
) -> None:
    """Restored into another model, every good checkpoint of the run would be called corrupt, one
    after another."""
    before = contents(begun)
    said = say("run", *SMALL, key, *asked)
    assert said.code == 2
    name, _, _ = key.partition("=")
    assert said.err.startswith(
        f"opt-train: {begun} was trained with another model or other data ({name}: "
    )
    assert said.err.endswith("which nothing trained there fits; choose another name=\n")
    assert contents(begun) == before


def test_data_prepared_of_another_corpus_is_refused_alone_too(workplace: Path, say) -> None:
    shutil.copytree(workplace / "corpus", workplace / "other")
    said = say("train", *SMALL, "data.corpus=other", "name=lone")
    assert said.code == 2
    assert "was prepared" in said.err
    assert len(said.err.splitlines()) == 1


def test_a_crash_before_a_lineage_is_journalled_does_not_pass_for_consent(begun: Path, say) -> None:
    # The new configuration lay in the run directory already when the machine died.
    directory, changed = lineage.resolve(compose([*SMALL, "optim.lr=1e-3"]))
    lineage.write_configuration(
        directory, changed, lineage.classify_start(directory, changed, asked_for_lineage=True)
    )
    assert "lineage=new" in say("run", *SMALL, "optim.lr=1e-3").err


def test_a_run_whose_lineage_cannot_be_read_does_not_pass_for_a_new_one(begun: Path, say) -> None:
    journal = begun / "journal.jsonl"
    created, opened = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(created + opened.replace(b'"lineage":1', b'"lineage":7'))
    before = contents(begun)
    said = say("run", *SMALL, "optim.lr=1e-3")
    assert (said.code, said.err) == (
        2,
        f"opt-train: {journal} is damaged (line 2), and no line is left that tells what was "
        "trained here; "
        "restore it from a copy, or choose another name=\n",
    )
    assert contents(begun) == before


def test_a_run_that_another_start_began_meanwhile_keeps_its_configuration(begun: Path) -> None:
    """Ranks refuse a configuration that is not the one their attempt was started with: the run
    would halt."""
    directory, changed = lineage.resolve(compose([*SMALL, "checkpoint.keep=9"]))
    before = contents(begun)
    planned_when_there_was_none = lineage.RunStart(1, False, (), (), is_new=True, is_finished=False)
    created = run_created(changed, DatasetManifest.read(Path(changed.data.directory)))
    with pytest.raises(BadInput, match=r"changed by another process meanwhile; start again"):
        cli_run._supervise(
            directory, changed, created, planned_when_there_was_none, asked_for_lineage=False
        )
    assert {k: v for k, v in contents(begun).items() if k != "journal.lock"} == {
        k: v for k, v in before.items() if k != "journal.lock"
    }


def test_a_file_named_like_a_library_is_not_run_in_its_place(workplace: Path) -> None:
    (workplace / "datasets.py").write_text("raise SystemExit('this is the notebook of a user')")
    assert jobs.call(["prepare", *SMALL, "data.name=again"]) == 0


def test_an_interface_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, say
) -> None:
    """Every rank would fail at its first connection, and look like nodes that do."""
    monkeypatch.chdir(tmp_path)
    said = say("run", "cluster.interface=nowhere0")
    assert said.code == 2
    assert said.err.startswith(
        "opt-train: cluster.interface=nowhere0 is no network interface here; use one of lo"
    )


def test_a_clusters_recipe_does_not_start_its_ranks_on_one_machine(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, say
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1})
    files = ("data.corpus=corpus", "tokenizer.vocab_file=v", "tokenizer.merges_file=m")
    said = say("run", "experiment=opt-6.7b", *files, "train.device=cpu")
    assert said.code == 2
    assert said.err == (
        "opt-train: cluster=local would start 128 ranks on this machine of 2 cores; "
        "set cluster.nodes=1 cluster.buffer_nodes=0 and cluster.slots_per_node to what it holds\n"
    )
    assert not (workplace / "runs").exists()


def test_a_world_that_is_no_number_is_named(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, say
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "x")
    said = say("train", *SMALL)
    assert (said.code, said.err) == (
        2,
        "opt-train: WORLD_SIZE=x in the environment is no number of ranks; start the ranks with "
        "torchrun\n",
    )


def test_a_run_that_somebody_trains_is_left_alone(begun: Path, say) -> None:
    directory, _ = lineage.resolve(compose(SMALL))
    before = contents(begun)
    with Lock.acquire(directory):
        said = say("run", *SMALL, "checkpoint.keep=9")
    assert (said.code, len(said.err.splitlines())) == (2, 1)
    assert f"{begun} is in the hands of process {os.getpid()}" in said.err
    assert {k: v for k, v in contents(begun).items() if k != "journal.lock"} == {
        k: v for k, v in before.items() if k != "journal.lock"
    }


def test_other_data_under_the_same_name_is_refused(begun: Path, workplace: Path, say) -> None:
    dataset = workplace / "prepared" / "files-bpe" / "dataset.json"
    payload = json.loads(dataset.read_text())
    dataset.write_text(json.dumps(payload | {"fingerprint": "0" * 64}))
    said = say("run", *SMALL)
    assert said.code == 2
    assert (
        f"opt-train: data.directory holds other tokens than those {begun} was trained on"
        in said.err
    )


def test_a_folder_that_is_no_run_is_left_alone(workplace: Path, say) -> None:
    (workplace / "runs" / "small").mkdir(parents=True)
    (workplace / "runs" / "small" / "thesis.tex").write_text("years of work")
    said = say("run", *SMALL)
    assert (said.code, said.err) == (
        2,
        f"opt-train: {workplace}/runs/small exists and is no run directory; choose another name= "
        "or runs=, "
        "or remove it if nothing in it is wanted\n",
    )
    assert [p.name for p in (workplace / "runs" / "small").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("verb", ["run", "train"])
@pytest.mark.parametrize(
    "left",
    [
        "metrics/1.00.jsonl",
        "checkpoints/1.00/step-00000002/manifest.json",
        "memory/1.00/step-00000002/manifest.json",
    ],
)
def test_a_run_whose_journal_is_lost_is_not_begun_anew_over_what_it_trained(
    verb: str, left: str, begun: Path, say
) -> None:
    (begun / left).parent.mkdir(parents=True)
    (begun / left).write_text("{}")
    (begun / "journal.jsonl").unlink()
    (begun / "journal.head").unlink()
    before = contents(begun)
    for flags in ((), ("lineage=new",)):
        said = say(verb, *SMALL, *flags)
        assert (said.code, said.err) == (
            2,
            f"opt-train: {begun}/journal.jsonl no longer tells what was trained here, though "
            f"{begun}/{left} is there; "
            "restore journal.jsonl and journal.head from a copy, or choose another name=\n",
        )
    assert contents(begun) == before


def test_a_head_without_its_journal_is_not_begun_anew(begun: Path, say) -> None:
    (begun / "journal.jsonl").unlink()
    said = say("run", *SMALL)
    assert (said.code, len(said.err.splitlines())) == (2, 1)
    assert (
        f"{begun}/journal.jsonl no longer tells what was trained here, though "
        f"{begun}/journal.head is" in said.err
    )


needs_mounts = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("mount") is None,
    reason="only root can mount file systems to be full or read-only",
)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A mount point, unmounted in the end."""
    point = tmp_path / "mounted"
    point.mkdir()
    yield point
    subprocess.run(["umount", point], check=True)


@needs_mounts
def test_no_space_for_checkpoints_is_told_before_anything_starts(
    mounted: Path, workplace: Path, say
) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mounted], check=True)
    said = say("run", *SMALL, f"runs={mounted}")
    assert (said.code, said.err) == (
        2,
        f"opt-train: runs={mounted} has 1.05 MB free, but 3 checkpoints of 127,872 parameters and "
        "the next one take "
        "6.14 MB; make space or choose another runs=\n",
    )
    assert list(mounted.iterdir()) == []


@needs_mounts
def test_an_unwritable_folder_is_told_before_anything_starts(
    mounted: Path, workplace: Path, say
) -> None:
    subprocess.run(["mount", "--bind", mounted, mounted], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", mounted], check=True)
    said = say("run", *SMALL, f"runs={mounted}/runs")
    assert (said.code, said.err) == (
        2,
        f"opt-train: runs={mounted}/runs cannot be written to; mend the permissions of {mounted} "
        "or choose another "
        "runs=\n",
    )
    assert list(mounted.iterdir()) == []
