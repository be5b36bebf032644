"""A user's mistake must be one sentence and exit 2, with nothing started: not a traceback, not a
half-made run."""

import json
import os
import shutil
import subprocess
import sys
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

ALL_VERBS = (
    "prepare, run, train, plan, status, stop, checkpoints, evaluate, generate, export, import"
)

MISTAKES = {
    "misspelt verb": ("trian", "trian is no verb; did you mean train?"),
    "no such verb": ("xyz", f"xyz is no verb; use {ALL_VERBS}"),
    "misspelt flag": (
        "run --mutlirun",
        "--mutlirun is no flag of opt-train run; did you mean --multirun?",
    ),
    "wrong flag value": ("run --cfg all", "--cfg=all is not possible; only --cfg=job is"),
    "misspelt room": (
        "run modle.layers=3",
        "modle.layers is no configuration key; did you mean model.layers?",
    ),
    "misspelt key": (
        "run optim.beta_1=0.9",
        "optim.beta_1 is no configuration key; did you mean optim.beta1?",
    ),
    "key without its room": ("run lr=1e-3", "lr is no configuration key; did you mean optim.lr?"),
    "misspelt group": (
        "run tokeniser=bpe",
        "tokeniser is no configuration key; did you mean tokenizer?",
    ),
    "misspelt group value": (
        "run model=opt-126m",
        "model=opt-126m does not exist; did you mean opt-125m?",
    ),
    "misspelt experiment": (
        "run experiment=dmeo",
        "experiment=dmeo does not exist; did you mean demo?",
    ),
    "no number": ("run optim.lr=abc", "optim.lr=abc is not a number; give one like 6e-4"),
    "no whole number": (
        "run model.layers=2.5",
        "model.layers=2.5 is not a whole number; give one like 12",
    ),
    "true is no number": (
        "run train.steps=true",
        "train.steps=True is not a whole number; give one like 1000",
    ),
    "a number for text": ("run name=12", "name=12 is not text; put it in quotes: 'name=\"12\"'"),
    "nothing at all": ("run seed=null", "seed=None is not a whole number; give one like 0"),
    "not a number": (
        "run model.dropout=nan",
        "model.dropout=nan is not a finite number; give one like 0.1",
    ),
    "no assignment": (
        "run experiment",
        "'experiment' is not key=value; write model=tiny or optim.lr=3e-4, and double quotes "
        "around a value with "
        "spaces, brackets or =: 'data.corpus=\"my text\"'",
    ),
    "adding a key": (
        "run +optim.momentum=1",
        "+optim.momentum=1 adds or removes a key, but all keys are known; "
        "write optim.momentum=VALUE",
    ),
    "sweep without multirun": (
        "run model=tiny,demo",
        "model=tiny,demo is a list of values; give --multirun to try each, or quote it: "
        "'model=\"tiny,demo\"'",
    ),
    "no config folder": (
        "run --config-dir nowhere",
        "--config-dir=nowhere is not a folder; give one that holds groups, as model/mine.yaml",
    ),
    "heads and tensor": (
        "run parallel.tensor=5",
        "parallel.tensor=5 must divide model.heads=12; use 1, 2 or 4",
    ),
    "tensor parallel": (
        "run parallel.tensor=2 data.sequence_length=1023",
        "parallel.tensor=2 must divide data.sequence_length=1023; use 1",
    ),
    "heads and width": (
        "run model.heads=7",
        "model.heads=7 must divide model.d_model=768; use 6 or 8",
    ),
    "sequence and positions": (
        "run data.sequence_length=4096",
        "data.sequence_length=4096 is longer than model.positions=2048; use "
        "data.sequence_length=2048 or fewer, "
        "or more positions",
    ),
    "vocabulary and model": (
        "run tokenizer.vocab_size=60000",
        "tokenizer.vocab_size=60000 is larger than model.vocab_size=50272; train fewer entries or "
        "set "
        "model.vocab_size=60000",
    ),
    "no corpus named": (
        "run data=files",
        "data.corpus has no value; give a file, a folder or a glob, as data.corpus=texts",
    ),
    "half a tokenizer": (
        "run tokenizer.vocab_file=vocab.json",
        "tokenizer.merges_file has no value; GPT-2's vocabulary needs both files, vocab and merges",
    ),
    "no such cluster": (
        "run cluster.kind=slrum",
        "cluster.kind=slrum is not possible; only local is known",
    ),
    "no such precision": (
        "run precision.compute=fp8",
        "precision.compute=fp8 is not possible; use fp32 or bf16 or fp16",
    ),
    "a name that leaves the folder": (
        "run name=../elsewhere",
        'name="../elsewhere" names no folder; use letters, digits, dots, dashes and underscores, '
        "no dot first, "
        "200 characters at most",
    ),
    "a seed beyond torch's": (
        "run seed=9223372036854775808",
        "seed=9223372036854775808 is too large; use one below 2**63",
    ),
    "a rank module that is none": (
        "run cluster.rank_module=opt_train.train.wram",
        "cluster.rank_module=opt_train.train.wram cannot be imported; the trainer is "
        "opt_train.train.warm",
    ),
    "a number beyond all floats": (
        f"run optim.lr={'9' * 400}",
        "optim.lr is too large a number; give one like 6e-4",
    ),
    "a glob that matches nothing": (
        "run --multirun model=glob(nothing*)",
        "model=glob(nothing*) matches nothing; choose from opt-1.3b, opt-125m, opt-13b, opt-175b, "
        "opt-2.7b, opt-30b, "
        "opt-350m, opt-6.7b, opt-66b, opt-demo, tiny",
    ),
    "a range without an end": (
        "run --multirun train.steps=range(1,3,0)",
        "train.steps=range(1,3,0) names no values; give a step that is not 0",
    ),
    "a plan that is none": (
        "run faults.plan=kill-nod@60",
        "faults.plan: 'kill-nod@60' is not <kind>@<step> with a kind of kill-node, kill-rank, "
        "stop-rank, "
        "kill-supervisor; write 'faults.plan=\"kill-node@60, kill-rank@120\"'",
    ),
    "a wrong job among good ones": (
        "run --multirun model=tiny seed=1,2,x",
        "seed=x is not a whole number; give one like 0",
    ),
    "no run there": (
        "status runs/none",
        "runs/none is no run directory: it has no journal; give one like runs/demo",
    ),
    "no run named": (
        "stop",
        "the following arguments are required: RUN; see `opt-train stop --help`",
    ),
    "nothing to go on from": (
        "run lineage=new name=fresh",
        "lineage=new has nothing to go on from: {here}/runs/fresh holds no run",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_starts_nothing(
    mistake: str, tmp_path, monkeypatch, say
) -> None:
    monkeypatch.chdir(tmp_path)
    words, sentence = MISTAKES[mistake]
    said = say(*words.split())
    assert said.err == f"opt-train: {sentence.format(here=tmp_path)}\n"
    assert (said.code, said.out) == (2, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "mistake", ["misspelt verb", "misspelt key", "no number", "heads and tensor", "no run there"]
)
def test_the_installed_command_says_the_same(mistake: str, tmp_path: Path) -> None:
    words, sentence = MISTAKES[mistake]
    command = Path(sys.executable).with_name("opt-train")
    said = subprocess.run(
        [command, *words.split()], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (said.returncode, said.stdout, said.stderr) == (2, "", f"opt-train: {sentence}\n")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_corpus_is_named(workplace: Path, say) -> None:
    said = say("run", *SMALL, "data.corpus=nowhere", "data.name=other")
    assert said.code == 2
    assert said.err.startswith("opt-train: data.corpus=nowhere ")
    assert len(said.err.splitlines()) == 1
    assert not (workplace / "runs").exists()


def test_an_empty_corpus_is_named(workplace: Path, say) -> None:
    (workplace / "empty").mkdir()
    (workplace / "empty" / "nothing.txt").touch()
    said = say("run", *SMALL, "data.corpus=empty", "data.name=other")
    assert (said.code, said.err) == (2, "opt-train: data.corpus=empty has no text; add documents\n")
    assert not (workplace / "runs").exists()


def test_a_shard_with_a_wrong_checksum_is_named(workplace: Path, say) -> None:
    shard = workplace / "prepared" / "files-bpe" / "train-00000.bin"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    said = say("run", *SMALL)
    assert said.code == 2
    assert said.err.startswith("opt-train: prepared/files-bpe/train-00000.bin ")
    assert "checksum" in said.err
    assert len(said.err.splitlines()) == 1
    assert not (workplace / "runs").exists()


def test_a_prepared_vocabulary_larger_than_the_models_is_named(workplace: Path, say) -> None:
    # Files decide the vocabulary's size, so that only the prepared data can tell.
    tokenizer = json.loads((workplace / "prepared" / "files-bpe" / "tokenizer.json").read_text())
    Path("vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]))
    pairs = [
        " ".join(pair) if isinstance(pair, list) else pair for pair in tokenizer["model"]["merges"]
    ]
    Path("merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n")
    said = say(
        "run",
        *SMALL,
        "tokenizer=gpt2",
        "tokenizer.vocab_file=vocab.json",
        "tokenizer.merges_file=merges.txt",
        "model.vocab_size=300",
    )
    assert (said.code, said.err) == (
        2,
        "opt-train: model.vocab_size=300 is smaller than the 400 entries of tokenizer 'gpt2' that "
        "prepared "
        "data.name='files'; use model.vocab_size=400 or more\n",
    )
    assert not (workplace / "runs").exists()


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
