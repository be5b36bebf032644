"""`opt-train export` and `import` around a real run: what comes back can be evaluated, asked and
trained on."""

import json
import resource
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from opt_logbook.record.run_directory import RunDirectory
from safetensors.torch import load_file
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, OPTForCausalLM

from opt_train.data.tokenizer import load
from opt_train.exchange.checkpoint import weights_in
from tests.command import SMALL, say_apart

SHAPE = ("model.layer_norm=post", "model.embed_dim=32", "data.validation_fraction=0.2")
DATA = Path("prepared", "files-bpe")


@pytest.fixture(scope="module")
def trained_once(prepared_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workplace with a run, kept as `kept` beside it."""
    folder = tmp_path_factory.mktemp("exchange") / "workplace"
    shutil.copytree(prepared_once, folder)
    said = say_apart(folder, "train", *SMALL, *SHAPE, "train.steps=4")
    assert said.code == 0, said.err
    shutil.copytree(folder, folder.with_name("kept"))
    return folder


@pytest.fixture
def trained(trained_once: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run in the workplace as it was, which is the working directory: in the same place, for
    a run knows where its data lie."""
    shutil.rmtree(trained_once)
    shutil.copytree(trained_once.with_name("kept"), trained_once)
    monkeypatch.chdir(trained_once)
    return Path("runs", "small")


def test_weights_go_out_and_come_back(trained: Path, say) -> None:
    said = say("export", str(trained), "--to", "hf")
    assert (said.code, said.err) == (0, "")
    assert said.out == "hf: small at step 4, 119,040 parameters in fp32, model.safetensors\n"
    theirs = OPTForCausalLM.from_pretrained("hf")
    words = AutoTokenizer.from_pretrained("hf")
    assert words("def x():")["input_ids"] == load(DATA / "tokenizer.json").encode("def x():").ids
    assert sum(p.numel() for p in theirs.parameters()) == 119_040

    told = json.loads(say("import", "hf", "--to", "back", "--json").out)
    assert (told["kind"], told["dtype"], told["tokenizer"]) == ("safetensors", "fp32", True)
    ours, its = (
        json.loads(said.out)["sets"]
        for said in (
            say("evaluate", str(trained), "--json"),
            say("evaluate", "back", "--data", str(DATA), "--json"),
        )
    )
    for mine, back in zip(ours, its, strict=True):
        assert back == {
            **mine,
            "loss": pytest.approx(mine["loss"]),
            "perplexity": pytest.approx(mine["perplexity"]),
        }
    ask = ("def ", "--greedy", "--max-new-tokens", "6")
    assert say("generate", "back", *ask).out == say("generate", str(trained), *ask).out
    assert (
        say("generate", "back", *ask, "--data", str(DATA)).out
        == say("generate", str(trained), *ask).out
    )


def test_an_older_checkpoint_goes_out_by_step_and_by_folder(workplace: Path, say) -> None:
    assert say("train", *SMALL, *SHAPE, "train.steps=8").code == 0
    assert (
        json.loads(say("export", "name=small", "--checkpoint", "4", "--to", "a", "--json").out)[
            "step"
        ]
        == 4
    )
    folder = RunDirectory(Path("runs", "small")).checkpoint("1.00", 4)
    assert (
        say("export", str(folder), "--to", "b", "--dtype", "bf16", "--max-shard-size", "100KB").code
        == 0
    )
    assert len(list(Path("b").glob("*.safetensors"))) > 1
    whole, parts = load_file("a/model.safetensors"), {}
    for path in Path("b").glob("*.safetensors"):
        parts |= load_file(path)
    assert {name: tensor.bfloat16().tolist() for name, tensor in whole.items()} == {
        name: tensor.tolist() for name, tensor in parts.items()
    }


def test_a_run_begins_with_imported_weights(trained: Path, say) -> None:
    assert say("export", str(trained), "--to", "hf", "--dtype", "bf16").code == 0
    assert say("import", "hf", "--to", "back").code == 0
    first = say(
        "train",
        *SMALL,
        *SHAPE,
        "name=on",
        "train.steps=3",
        "optim.lr=1e-30",
        "train.initial_weights=back",
    )
    assert first.code == 0, first.err
    [folder] = Path("runs", "on", "checkpoints", "1.00").iterdir()
    begun = {name: stored.read() for name, stored in weights_in(folder, None).items()}
    for name, tensor in load_file("hf/model.safetensors").items():
        assert begun[name].dtype == torch.float32
        torch.testing.assert_close(begun[name], tensor.float(), rtol=0, atol=1e-9)
    # A checkpoint is its own beginning: what the run began with is not asked for again, and is
    # fixed for its life.
    shutil.rmtree("back")
    words = (*SMALL, *SHAPE, "name=on", "train.steps=4", "optim.lr=1e-30", "lineage=new")
    assert say("train", *words, "train.initial_weights=back").code == 0
    said = say("train", *words, "train.initial_weights=hf")
    assert said.code == 2
    assert "was trained with another model or other data (train.initial_weights: " in said.err


def test_another_run_may_begin_with_a_runs_own_checkpoint(trained: Path, say) -> None:
    folder = RunDirectory(trained).checkpoint("1.00", 4)
    said = say(
        "train", *SMALL, *SHAPE, "name=on", "train.steps=3", f"train.initial_weights={folder}"
    )
    assert said.code == 0, said.err
    said = say(
        "train",
        *SMALL,
        "data.validation_fraction=0.2",
        "name=no",
        f"train.initial_weights={folder}",
    )
    assert said.code == 2
    assert f"train.initial_weights={folder.absolute()} does not fit: " in said.out


def test_a_mistake_is_one_sentence(trained: Path, say) -> None:
    assert say("export", str(trained), "--to", "hf").code == 0
    assert say("import", "hf", "--to", "back").code == 0
    back = Path("back").absolute()
    for words, expected in (
        (
            ("export", str(trained)),
            "the following arguments are required: --to; see `opt-train export --help`",
        ),
        (
            ("export", str(trained), "--to", "hf"),
            "--to=hf exists and is not empty; give another folder, or remove it",
        ),
        (
            ("export", str(trained), "--to", "x", "--dtype", "int8"),
            "--dtype=int8 is not possible; use fp32, bf16 or fp16",
        ),
        (
            ("export", str(trained), "--to", "x", "--max-shard-size", "5XB"),
            "--max-shard-size=5XB is no size; write one as 5GB or 500MB",
        ),
        (
            ("export", str(trained), "--to", "x", "--checkpoint", "3"),
            "--checkpoint=3 is not in runs/small; `opt-train checkpoints runs/small` lists them",
        ),
        (
            ("evaluate", "back"),
            f"{back} belongs to no run, and so has no data; name prepared data with --data",
        ),
        (
            ("evaluate", "back", "--checkpoint", "4", "--data", str(DATA)),
            "back is a checkpoint itself; leave --checkpoint=4 out",
        ),
        (
            ("evaluate", str(trained), "--data", str(DATA)),
            "runs/small has its own data; --data is for imported weights",
        ),
        (
            ("train", *SMALL, "name=no", "train.initial_weights=back"),
            f"train.initial_weights={back} has model.layer_norm='post' and the configuration "
            "'pre'; "
            "use model.layer_norm=post, or other weights",
        ),
        (
            ("train", *SMALL, "name=no", "train.initial_weights=nowhere"),
            f"train.initial_weights={Path('nowhere').absolute()} is no whole checkpoint: "
            f"{Path('nowhere').absolute()}/manifest.json is missing; name another",
        ),
    ):
        said = say(*words)
        assert (said.code, said.out, said.err) == (2, "", f"opt-train: {expected}\n")
    assert not Path("x").exists()
    assert not Path("runs", "no").exists()


def test_a_checkpoint_is_found_in_its_run_however_its_folder_is_written(
    trained: Path, tmp_path: Path, say
) -> None:
    folder = RunDirectory(trained).checkpoint("1.00", 4)
    ask = ("def ", "--greedy", "--max-new-tokens", "6")
    wanted = say("generate", str(trained), *ask).out
    Path("link").symlink_to(folder.absolute())
    (folder.parent.parent / "1.01").mkdir()
    for written in ("link", str(folder.parent.parent / "1.01" / ".." / "1.00" / folder.name)):
        said = say("generate", written, *ask)
        assert (said.code, said.out) == (0, wanted), said.err
    shutil.move(folder.parent.parent, tmp_path / "disk")
    folder.parent.parent.symlink_to(tmp_path / "disk")
    assert say("generate", str(folder), *ask).out == wanted

    with tempfile.TemporaryDirectory() as short:  # a path of few parts
        shutil.copytree(folder, short, dirs_exist_ok=True)
        said = say("generate", short, "a")
        assert (said.code, said.out, said.err.count("\n")) == (2, "", 1)
        assert f"{short} is a run's checkpoint outside its run directory" in said.err


def test_an_export_never_takes_another_tokenizer_along(trained: Path, say) -> None:
    path = DATA / "tokenizer.json"
    words = json.loads(path.read_text())
    words["model"]["merges"].pop()
    path.write_text(json.dumps(words))
    said = say("export", str(trained), "--to", "hf")
    assert said.code == 0
    last = said.out.splitlines()[-1]
    assert last.startswith(
        f"without its tokenizer: {path.absolute()} has changed since the data was prepared"
    )
    assert not Path("hf", "tokenizer.json").exists()
    shutil.rmtree(DATA)
    said = say("export", str(trained), "--to", "bare")
    assert said.code == 0
    assert f"without its tokenizer: {DATA.absolute()}/dataset.json does not exist" in said.out


def test_a_tokenizer_that_begins_texts_itself_begins_them_once(trained: Path, say) -> None:
    """As the released models' does: its file says to put `</s>` in front."""
    assert say("export", str(trained), "--to", "hf").code == 0
    words = Tokenizer.from_file("hf/tokenizer.json")
    words.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 2)]
    )
    words.save("hf/tokenizer.json")
    assert Tokenizer.from_file("hf/tokenizer.json").encode("def ").ids[0] == 2
    assert say("import", "hf", "--to", "back").code == 0
    ask = ("def ", "--seed", "3", "--max-new-tokens", "6")
    assert say("generate", "back", *ask).out == say("generate", str(trained), *ask).out


def test_another_models_tokenizer_is_refused(trained: Path, say) -> None:
    assert say("export", str(trained), "--to", "hf").code == 0
    own = json.loads(Path("hf", "tokenizer.json").read_text())
    for path in (*Path("hf").glob("tokenizer*"), Path("hf", "special_tokens_map.json")):
        path.unlink()
    assert say("import", "hf", "--to", "bare").code == 0
    other = (
        *SMALL[:-1],
        "data.validation_fraction=0.2",
        "data.name=large",
        "tokenizer.vocab_size=900",
    )
    assert say("prepare", *other, "model.vocab_size=900").code == 0
    said = say("generate", "bare", "def text(self)", "--data", "prepared/large-bpe")
    assert (said.code, said.out) == (2, "")
    assert (
        "the tokenizer in prepared/large-bpe has 900 entries and the model 400; give the one"
        in said.err
    )
    own["model"]["vocab"]["<|endoftext|>"] = own["model"]["vocab"].pop("</s>")
    own["added_tokens"] = [token for token in own["added_tokens"] if token["content"] != "</s>"]
    Path("hf", "tokenizer.json").write_text(json.dumps(own))
    assert say("import", "hf", "--to", "back").code == 0
    said = say("generate", "back", "def")
    assert (said.code, said.out) == (2, "")
    assert (
        "has </s> at None, where OPT has 2; give the one that the model was trained with"
        in said.err
    )


def test_perplexity_by_another_tokenizer_is_refused(trained: Path, say) -> None:
    assert say("export", str(trained), "--to", "hf").code == 0
    assert say("import", "hf", "--to", "back").code == 0
    other = (
        *SMALL[:-1],
        "data.validation_fraction=0.2",
        "data.name=other",
        "tokenizer.vocab_size=300",
    )
    assert say("prepare", *other).code == 0
    said = say("evaluate", "back", "--data", "prepared/other-bpe")
    assert said.code == 2
    assert (
        "--data=prepared/other-bpe was prepared with another tokenizer than came with" in said.err
    )


@pytest.mark.parametrize("verb", ["train", "run"])
@pytest.mark.parametrize("files", [False, True], ids=["json", "two-files"])
def test_a_run_on_another_tokenizers_ids_is_refused(
    verb: str, files: bool, trained: Path, say
) -> None:
    assert say("export", str(trained), "--to", "hf").code == 0
    words = json.loads(Path("hf", "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    first, second = (entry for entry, number in vocabulary.items() if number in (100, 101))
    vocabulary[first], vocabulary[second] = (
        vocabulary[second],
        vocabulary[first],
    )  # of the same size
    if files:
        Path("hf", "tokenizer.json").unlink()
        Path("hf", "vocab.json").write_text(json.dumps(vocabulary))
        merges = [
            one if isinstance(one, str) else " ".join(one) for one in words["model"]["merges"]
        ]
        Path("hf", "merges.txt").write_text("\n".join(merges))
    else:
        Path("hf", "tokenizer.json").write_text(json.dumps(words))
    assert say("import", "hf", "--to", "back").code == 0
    back, data = Path("back").absolute(), DATA.absolute()
    said = say(verb, *SMALL, *SHAPE, "name=no", "train.initial_weights=back")
    own = f"tokenizer=gpt2 tokenizer.vocab_file={back}/tokenizer/vocab.json "
    mend = (
        own + f"tokenizer.merges_file={back}/tokenizer/merges.txt"
        if files
        else "data that was prepared with the"
    )
    assert (said.code, said.err.count("\n")) == (2, 1), said
    assert (
        f"={back} came with another tokenizer ({back}/tokenizer) than the data's "
        f"({data}/tokenizer.json)" in said.err
    )
    assert f"; use {mend}" in said.err
    assert not Path("runs", "no").exists()

    if files and verb == "train":  # what the sentence says to do
        given = (*SMALL, *SHAPE, "name=no", "train.steps=3", *mend.split())
        assert say("prepare", *given).code == 0
        said = say("train", *given, "train.initial_weights=back")
        assert said.code == 0, said.err


def test_files_of_another_tokenizer_are_refused_before_anything_is_prepared(
    trained: Path, say
) -> None:
    assert say("export", str(trained), "--to", "hf").code == 0
    assert say("import", "hf", "--to", "back").code == 0
    model = json.loads(Path("hf", "tokenizer.json").read_text())["model"]
    first, second = (entry for entry, number in model["vocab"].items() if number in (100, 101))
    Path("vocab.json").write_text(json.dumps(model["vocab"] | {first: 101, second: 100}))
    Path("merges.txt").write_text("")
    files = (
        "tokenizer=gpt2",
        "tokenizer.vocab_file=vocab.json",
        "tokenizer.merges_file=merges.txt",
    )
    said = say("run", *SMALL, *SHAPE, *files, "name=no", "train.initial_weights=back")
    assert said.code == 2
    assert "than the data's (vocab.json)" in said.err
    assert [path.name for path in DATA.parent.iterdir()] == [DATA.name]


def test_an_export_that_finds_no_room_is_one_sentence_and_leaves_nothing(
    trained: Path, say
) -> None:
    before = sorted(Path().iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (100_000, limits[1])
    )  # the system's own refusal, in mid-file
    try:
        said = say("export", str(trained), "--to", "hf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    place = Path("hf").absolute()
    assert (said.code, said.out, said.err) == (
        2,
        "",
        f"opt-train: {place}: File too large; mend it and try again\n",
    )
    assert sorted(Path().iterdir()) == before
