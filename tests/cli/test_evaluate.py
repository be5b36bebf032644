"""`opt-train evaluate` and `generate` read a real run, also while others use it, and leave it as it
was."""

import json
import shutil
from pathlib import Path

import pytest
from opt_logbook.record.events import RunFinished, ValidationMeasured
from opt_logbook.record.journal import read
from opt_logbook.record.run_directory import RunDirectory

from opt_train.data.manifest import DatasetManifest
from opt_train.data.tokenizer import load
from tests.command import SMALL, say_apart

LATER = 'data.validation_sets="web=web.txt,later=web.txt"'
"""A set that nobody thought of while the run trained."""


@pytest.fixture(scope="module")
def trained(prepared_once: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run of the decoder that the released OPT-350M is: LayerNorms behind, a narrower
    embedding."""
    folder = tmp_path_factory.mktemp("trained") / "workplace"
    shutil.copytree(prepared_once, folder)
    (folder / "web.txt").write_text(
        "This is a text of another kind, said over and over again. " * 40
    )
    words = (
        *SMALL,
        "data.validation_fraction=0.2",
        'data.validation_sets="web=web.txt"',
        "name=narrow",
        "model.layer_norm=post",
        "model.embed_dim=32",
        "train.steps=16",
        "checkpoint.every_steps=8",
        "train.validate_every=8",
    )
    for verb, given in (("prepare", words), ("train", words), ("prepare", (*words, LATER))):
        done = say_apart(folder, verb, *given)
        assert done.code == 0, done.err
    return RunDirectory(folder / "runs" / "narrow")


@pytest.fixture
def beside(trained: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """The run, seen from the folder that it was trained in."""
    monkeypatch.chdir(trained.path.parent.parent)
    return RunDirectory(Path("runs", "narrow"))


def test_the_perplexity_is_the_one_that_training_measured(beside: RunDirectory, say) -> None:
    events = [
        (e.step, e.event)
        for e in read(beside.journal).entries
        if isinstance(e.event, ValidationMeasured)
    ]
    measured = {(step, event.name): event for step, event in events}
    assert measured.keys() == {(step, name) for step in (8, 16) for name in ("validation", "web")}
    newest = json.loads(say("evaluate", str(beside.path), "--json").out)
    for told in (
        newest,
        json.loads(say("evaluate", "name=narrow", "--checkpoint", "8", "--json").out),
    ):
        sets = {one["name"]: one for one in told["sets"]}
        assert list(sets) == ["validation", "web", "later"]
        for name in ("validation", "web"):
            event = measured[told["step"], name]
            assert sets[name]["loss"] == pytest.approx(event.loss, rel=1e-6)
            assert sets[name]["perplexity"] == pytest.approx(event.perplexity, rel=1e-6)
            assert sets[name]["tokens"] == event.tokens
        assert sets["later"] == {**sets["web"], "name": "later"}, (
            "the same text measured after the run"
        )
        assert sets["web"]["loss"] != pytest.approx(sets["validation"]["loss"], rel=1e-4)
    assert newest["step"] == 16
    assert (
        newest["unigram_perplexity"]
        == DatasetManifest.read(Path("prepared", "files-bpe")).unigram_perplexity
    )


def test_what_the_run_came_to_is_of_the_held_out_text(beside: RunDirectory, say) -> None:
    """The set that is measured last must not pass for it."""
    entries = read(beside.journal).entries
    last = [e.event for e in entries if isinstance(e.event, ValidationMeasured)]
    [finished] = [e.event for e in entries if isinstance(e.event, RunFinished)]
    assert [event.name for event in last[-2:]] == ["validation", "web"]
    assert finished.validation_perplexity == last[-2].perplexity
    assert (
        json.loads(say("status", str(beside.path), "--json").out)["validation_perplexity"]
        == last[-2].perplexity
    )


def test_the_table_says_the_numbers_of_the_json(beside: RunDirectory, say) -> None:
    listed = json.loads(say("checkpoints", str(beside.path), "--json").out)
    words = ("evaluate", str(beside.path), "--checkpoint", listed[0]["path"])
    said, numbers = say(*words), json.loads(say(*words, "--json").out)
    assert (said.code, said.err) == (0, "")
    first, head, *rows, last = said.out.splitlines()
    assert first == "narrow at step 8; loss in nats a token"
    assert head.split() == ["set", "tokens", "loss", "perplexity"]
    assert [row.split() for row in rows] == [
        [one["name"], f"{one['tokens']:,}", f"{one['loss']:.4f}", f"{one['perplexity']:.2f}"]
        for one in numbers["sets"]
    ]
    assert last.startswith("a unigram model of the same data has ")


def test_a_set_by_name_is_measured_alone(beside: RunDirectory, say) -> None:
    everything = json.loads(say("evaluate", "name=narrow", "--json").out)["sets"]
    told = json.loads(
        say(
            "evaluate", "name=narrow", "--set", "later", "--set", "web", "--set", "web", "--json"
        ).out
    )
    assert told["sets"] == [everything[2], everything[1]]
    assert "unigram" not in say("evaluate", "name=narrow", "--set", "web").out


def test_the_text_as_it_comes_is_the_text_at_the_end(beside: RunDirectory, say) -> None:
    prompt = "import é☃"
    words = (
        "generate",
        "name=narrow",
        prompt,
        "--seed",
        "5",
        "--temperature",
        "2",
        "--max-new-tokens",
        "12",
    )
    plain, whole = say(*words), json.loads(say(*words, "--json").out)
    assert plain.code == 0
    assert plain.out == prompt + whole["text"] + "\n"
    assert len(whole["tokens"]) == 12
    assert whole["text"] == load(Path("prepared", "files-bpe", "tokenizer.json")).decode(
        whole["tokens"]
    )
    assert say(*words).out == plain.out
    assert say(*words, "--seed", "6").out != plain.out


def test_a_draw_from_one_token_is_greedy(beside: RunDirectory, say) -> None:
    greedy, drawn = (
        say("generate", "name=narrow", "def ", *how) for how in (("--greedy",), ("--top-k", "1"))
    )
    assert (greedy.code, greedy.out) == (0, drawn.out)
    assert greedy.out.startswith("def ")


def test_nothing_in_the_run_changes(beside: RunDirectory, say) -> None:
    def content() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in beside.path.rglob("*") if path.is_file()}

    before = content()
    say("evaluate", str(beside.path))
    say("generate", str(beside.path), "")
    assert content() == before


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ("evaluate", "name=missing"),
            "name=missing has no run directory runs/missing; the nearest name there is narrow, and "
            "a run of another runs= is given by its path",
        ),
        (
            ("evaluate", "name=narrow", "--checkpoint", "5"),
            "--checkpoint=5 is not in runs/narrow; `opt-train checkpoints runs/narrow` lists them",
        ),
        (
            ("evaluate", "name=narrow", "--set", "books"),
            "--set=books is not in {data}, which holds validation, web, later; "
            "`opt-train prepare` adds what data.validation_sets names",
        ),
        (
            ("evaluate", "name=narrow", "--set", "train"),
            "--set=train is not in {data}, which holds validation, web, later; "
            "`opt-train prepare` adds what data.validation_sets names",
        ),
        (
            ("generate", "name=narrow"),
            "the following arguments are required: PROMPT; see `opt-train generate --help`",
        ),
        (
            ("generate", "name=narrow", "a", "--temperature", "0"),
            "--temperature=0 must be larger than 0; --greedy takes the likeliest token",
        ),
        (
            ("generate", "name=narrow", "a", "--max-new-tokens", "0"),
            "--max-new-tokens=0 must be larger than 0",
        ),
        (
            ("generate", "name=narrow", "a", "--max-new-tokens", "31"),
            "--max-new-tokens=31 and the prompt's 2 are more than the model's 32 positions; use "
            "30 or fewer",
        ),
        (
            ("generate", "name=narrow", "0 " * 40),
            "the prompt has 81 tokens, and the model has 32 positions; give a shorter one",
        ),
        (
            ("generate", "name=narrow", "\udcff"),
            "the prompt is not UTF-8; give it in the terminal's encoding",
        ),
    ],
)
def test_a_mistake_is_one_sentence(
    words: tuple[str, ...], expected: str, beside: RunDirectory, say
) -> None:
    said = say(*words)
    expected = expected.replace("{data}", str(Path("prepared", "files-bpe").absolute()))
    assert (said.code, said.out, said.err) == (2, "", f"opt-train: {expected}\n")


@pytest.fixture
def copy(beside: RunDirectory, tmp_path: Path) -> RunDirectory:
    """A copy of the run that a test may damage."""
    shutil.copytree(beside.path, tmp_path / "narrow")
    return RunDirectory(tmp_path / "narrow")


def test_a_damaged_checkpoint_is_never_evaluated(copy: RunDirectory, say) -> None:
    [shard] = copy.checkpoint("1.00", 16).glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    for words in (("evaluate", str(copy.path)), ("generate", str(copy.path), "a")):
        said = say(*words)
        assert (said.code, said.out, said.err.count("\n")) == (2, "", 1)
        assert f"{shard} has a wrong checksum; give another --checkpoint" in said.err
    assert say("evaluate", str(copy.path), "--checkpoint", "8").code == 0


def test_another_tokenizer_than_the_runs_is_refused(
    copy: RunDirectory, tmp_path: Path, say
) -> None:
    data = tmp_path / "prepared"
    shutil.copytree(Path("prepared", "files-bpe"), data)
    configuration = json.loads(copy.config_json.read_text())
    configuration["data"]["directory"] = str(data)
    copy.config_json.write_text(json.dumps(configuration))
    (data / "tokenizer.json").write_text((data / "tokenizer.json").read_text() + "\n")
    said = say("generate", str(copy.path), "a")
    assert (said.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert f"{data / 'tokenizer.json'} has changed since the data was prepared" in said.err
    shutil.rmtree(data)
    assert f"{data / 'dataset.json'} does not exist" in say("evaluate", str(copy.path)).err
