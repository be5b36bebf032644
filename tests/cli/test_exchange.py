"""`opt-train export` and `import` around a real run: what comes back can be evaluated, asked and trained on."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from opt_logbook.run_directory import RunDirectory
from safetensors.torch import load_file
from transformers import AutoTokenizer, OPTForCausalLM

from opt_train.data.tokenizer import load
from opt_train.exchange.checkpoint import weights_in
from tests.cli.conftest import SMALL

SHAPE = ("model.layer_norm=post", "model.embed_dim=32", "data.validation_fraction=0.2")
DATA = Path("prepared", "files-bpe")


@pytest.fixture
def trained(workplace: Path, say) -> Path:
    said = say("train", *SMALL, *SHAPE, "train.steps=4")
    assert said.code == 0, said.err
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
        for said in (say("evaluate", str(trained), "--json"), say("evaluate", "back", "--data", str(DATA), "--json"))
    )
    for mine, back in zip(ours, its, strict=True):
        assert back == {**mine, "loss": pytest.approx(mine["loss"]), "perplexity": pytest.approx(mine["perplexity"])}
    ask = ("def ", "--greedy", "--max-new-tokens", "6")
    assert say("generate", "back", *ask).out == say("generate", str(trained), *ask).out
    assert say("generate", "back", *ask, "--data", str(DATA)).out == say("generate", str(trained), *ask).out


def test_an_older_checkpoint_goes_out_by_step_and_by_folder(workplace: Path, say) -> None:
    assert say("train", *SMALL, *SHAPE, "train.steps=8").code == 0
    assert json.loads(say("export", "name=small", "--checkpoint", "4", "--to", "a", "--json").out)["step"] == 4
    folder = RunDirectory(Path("runs", "small")).checkpoint("1.00", 4)
    assert say("export", str(folder), "--to", "b", "--dtype", "bf16", "--max-shard-size", "100KB").code == 0
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
    first = say("train", *SMALL, *SHAPE, "name=on", "train.steps=3", "optim.lr=1e-30", "train.initial_weights=back")
    assert first.code == 0, first.err
    [folder] = Path("runs", "on", "checkpoints", "1.00").iterdir()
    begun = {name: stored.read() for name, stored in weights_in(folder, None).items()}
    for name, tensor in load_file("hf/model.safetensors").items():
        assert begun[name].dtype == torch.float32
        torch.testing.assert_close(begun[name], tensor.float(), rtol=0, atol=1e-9)
    # A checkpoint is its own beginning: what the run began with is not asked for again, and is fixed for its life.
    shutil.rmtree("back")
    words = (*SMALL, *SHAPE, "name=on", "train.steps=4", "optim.lr=1e-30", "lineage=new")
    assert say("train", *words, "train.initial_weights=back").code == 0
    said = say("train", *words, "train.initial_weights=hf")
    assert said.code == 2
    assert "was trained with another model or other data (train.initial_weights: " in said.err


def test_another_run_may_begin_with_a_runs_own_checkpoint(trained: Path, say) -> None:
    folder = RunDirectory(trained).checkpoint("1.00", 4)
    said = say("train", *SMALL, *SHAPE, "name=on", "train.steps=3", f"train.initial_weights={folder}")
    assert said.code == 0, said.err
    said = say("train", *SMALL, "data.validation_fraction=0.2", "name=no", f"train.initial_weights={folder}")
    assert said.code == 2
    assert f"train.initial_weights={folder.absolute()} does not fit: " in said.out


def test_a_mistake_is_one_sentence(trained: Path, say) -> None:
    assert say("export", str(trained), "--to", "hf").code == 0
    assert say("import", "hf", "--to", "back").code == 0
    back = Path("back").absolute()
    for words, expected in (
        (("export", str(trained)), "the following arguments are required: --to; see `opt-train export --help`"),
        (("export", str(trained), "--to", "hf"), "--to=hf exists and is not empty; give another folder, or remove it"),
        (("export", str(trained), "--to", "x", "--dtype", "int8"),
         "--dtype=int8 is not possible; use fp32, bf16 or fp16"),
        (("export", str(trained), "--to", "x", "--max-shard-size", "5XB"),
         "--max-shard-size=5XB is no size; write one as 5GB or 500MB"),
        (("export", str(trained), "--to", "x", "--checkpoint", "3"),
         "--checkpoint=3 is not in runs/small; `opt-train checkpoints runs/small` lists them"),
        (("evaluate", "back"), f"{back} belongs to no run, and so has no data; name prepared data with --data"),
        (("evaluate", "back", "--checkpoint", "4", "--data", str(DATA)),
         "back is a checkpoint itself; leave --checkpoint=4 out"),
        (("evaluate", str(trained), "--data", str(DATA)),
         "runs/small has its own data; --data is for imported weights"),
        (("train", *SMALL, "name=no", "train.initial_weights=back"),
         f"train.initial_weights={back} has model.layer_norm='post' and the configuration 'pre'; "
         "use model.layer_norm=post, or other weights"),
        (("train", *SMALL, "name=no", "train.initial_weights=nowhere"),
         f"train.initial_weights={Path('nowhere').absolute()} is no whole checkpoint: "
         f"{Path('nowhere').absolute()}/manifest.json is missing; name another"),
    ):  # fmt: skip
        said = say(*words)
        assert (said.code, said.out, said.err) == (2, "", f"opt-train: {expected}\n")
    assert not Path("x").exists()
    assert not Path("runs", "no").exists()


def test_perplexity_by_another_tokenizer_is_refused(trained: Path, say) -> None:
    assert say("export", str(trained), "--to", "hf").code == 0
    assert say("import", "hf", "--to", "back").code == 0
    other = (*SMALL[:-1], "data.validation_fraction=0.2", "data.name=other", "tokenizer.vocab_size=300")
    assert say("prepare", *other).code == 0
    said = say("evaluate", "back", "--data", "prepared/other-bpe")
    assert said.code == 2
    assert "--data=prepared/other-bpe was prepared with another tokenizer than came with" in said.err
