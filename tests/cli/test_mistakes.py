"""A user's mistake must be one sentence and exit 2, with nothing started: not a traceback, not a
half-made run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import SMALL

ALL_VERBS = (
    "prepare, run, submit, train, plan, preflight, status, stop, intervene, hold, resume, drill, "
    "tickets, checkpoints, ledger, batch, evaluate, generate, export, import"
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
        "cluster.kind=slrum is not possible; use local or slurm",
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
