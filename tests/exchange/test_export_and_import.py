"""What is exported computes in transformers what ours computes, and comes back to the bit."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

from opt_train.data import tokenizer
from opt_train.exchange.checkpoint import weights_in
from opt_train.exchange.configuration import from_hugging_face, to_hugging_face
from opt_train.exchange.exporting import export
from opt_train.exchange.importing import bring_in
from opt_train.exchange.sources import open_source
from opt_train.exchange.stored_tensor import shapes_of
from opt_train.model.config import ModelConfig
from opt_train.model.decoder import OPT
from opt_train.protocol.exits import BadInput
from tests.exchange.weights import SHARDED, checkpoint_of, drawn
from tests.model.twins import TINY, VARIANTS, twins
from tests.train.rig import ROOT, run_at_once


def exported(config: ModelConfig, tmp_path: Path, **how: object) -> tuple[OPT, Path]:
    ours, _ = twins(config)
    checkpoint = checkpoint_of(ours, tmp_path / "step-00000007")
    export(config, checkpoint, None, tmp_path / "hf", **how)  # type: ignore[arg-type]
    return ours, tmp_path / "hf"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: stored.read() for name, stored in weights_in(folder, None).items()}


def same(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_transformers_computes_our_logits(config: ModelConfig, tmp_path: Path) -> None:
    ours, folder = exported(config, tmp_path)
    theirs, told = OPTForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert not told["mismatched_keys"]
    tokens = torch.randint(
        4, config.vocab_size, (2, 31), generator=torch.Generator().manual_seed(1)
    )
    with torch.no_grad():
        expected = theirs.eval()(tokens).logits
        torch.testing.assert_close(ours(tokens), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_an_export_comes_back_to_the_bit(config: ModelConfig, tmp_path: Path) -> None:
    ours, folder = exported(config, tmp_path)
    done = bring_in(open_source(folder), tmp_path / "back")
    assert replace(done.model, name=config.name) == replace(config, embed_dim=done.model.embed_dim)
    same(weights(tmp_path / "back"), ours.state_dict())
    export(done.model, tmp_path / "back", done.manifest_sha256, tmp_path / "again")
    assert {path.name for path in folder.iterdir()} == {
        path.name for path in (tmp_path / "again").iterdir()
    }
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_the_configuration_is_the_one_that_transformers_writes(config: ModelConfig) -> None:
    told = to_hugging_face(config, "fp32")
    theirs = OPTConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        word_embed_proj_dim=config.embedding_width,
        do_layer_norm_before=config.layer_norm == "pre",
        num_hidden_layers=config.layers,
        ffn_dim=config.ffn,
        num_attention_heads=config.heads,
        max_position_embeddings=config.positions,
        dropout=config.dropout,
        attention_dropout=config.dropout,
        init_std=config.init_std,
        bos_token_id=2,
    )
    wanted = theirs.to_dict()
    for key in told.keys() & wanted.keys() - {"_name_or_path", "architectures", "torch_dtype"}:
        assert told[key] == wanted[key], key
    assert OPTConfig(**told).to_dict().keys() >= {
        "ffn_dim",
        "word_embed_proj_dim",
        "do_layer_norm_before",
    }
    back = from_hugging_face(Path("x/config.json"), told)
    assert replace(back, embed_dim=0) == replace(config, embed_dim=0)
    assert back.embedding_width == config.embedding_width


def test_the_shapes_are_the_models(tmp_path: Path) -> None:
    for config in [*VARIANTS.values(), SHARDED]:
        model = OPT(config)
        assert dict(shapes_of(config)) == {
            name: tuple(p.shape) for name, p in model.named_parameters()
        }


def test_files_stay_below_the_largest_size_and_hold_everything_once(tmp_path: Path) -> None:
    ours, folder = exported(TINY, tmp_path, shard_bytes=150_000)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2
    assert all(path.stat().st_size < 150_000 + 8_000 for path in files)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found: dict[str, torch.Tensor] = {}
    for path in files:
        part = load_file(path)
        assert not part.keys() & found.keys()
        assert all(index["weight_map"][name] == path.name for name in part)
        found |= part
    same(found, ours.state_dict())
    same(OPTForCausalLM.from_pretrained(folder).model.state_dict(), ours.model.state_dict())
    bring_in(open_source(folder), tmp_path / "back")
    same(weights(tmp_path / "back"), ours.state_dict())


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_another_type_is_torchs_own_rounding(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    ours, folder = exported(TINY, tmp_path, dtype=name)
    rounded = {key: tensor.to(dtype) for key, tensor in ours.state_dict().items()}
    same(load_file(folder / "model.safetensors"), rounded)
    assert OPTForCausalLM.from_pretrained(folder, dtype="auto").dtype == dtype
    assert bring_in(open_source(folder), tmp_path / "back").dtype == name
    same(weights(tmp_path / "back"), rounded)


def test_a_checkpoint_of_several_ranks_is_put_together(tmp_path: Path) -> None:
    folder, script = tmp_path / "step-00000007", ROOT / "tests" / "exchange" / "weights.py"
    run_at_once([[str(script), str(folder), str(rank), "2"] for rank in range(2)])
    assert len(list(folder.glob("*.safetensors"))) == 2
    export(SHARDED, folder, None, tmp_path / "hf")
    same(load_file(tmp_path / "hf" / "model.safetensors"), drawn(SHARDED).state_dict())


def test_what_transformers_saved_comes_in(tmp_path: Path) -> None:
    for config in (TINY, VARIANTS["post and projected"]):
        ours, theirs = twins(config)
        name = f"{config.layer_norm}-saved"
        theirs.save_pretrained(tmp_path / name, max_shard_size="100KB")
        assert (tmp_path / name / "model.safetensors.index.json").exists()
        bring_in(open_source(tmp_path / name), tmp_path / f"{name}-in")
        same(weights(tmp_path / f"{name}-in"), ours.state_dict())


@pytest.mark.parametrize("prefix", ["model.", ""], ids=["with the head", "without"])
@pytest.mark.parametrize("old", [False, True], ids=["zip", "before torch 1.6"])
def test_an_old_torch_bin_comes_in(prefix: str, old: bool, tmp_path: Path) -> None:
    ours, theirs = twins(TINY)
    theirs.config.save_pretrained(tmp_path)
    named = {
        prefix + name.removeprefix("model."): tensor for name, tensor in ours.state_dict().items()
    }
    if prefix:
        named["lm_head.weight"] = named["model.decoder.embed_tokens.weight"]
    torch.save(named, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not old)
    assert open_source(tmp_path).kind == "bin"
    bring_in(open_source(tmp_path), tmp_path / "in")
    same(weights(tmp_path / "in"), ours.state_dict())


def test_a_torch_bin_in_several_files_comes_in(tmp_path: Path) -> None:
    ours, theirs = twins(TINY)
    theirs.config.save_pretrained(tmp_path)
    placed = {}
    for number, name in enumerate(ours.state_dict()):
        placed[name] = f"pytorch_model-{number % 2}.bin"
    for file in set(placed.values()):
        torch.save(
            {n: t for n, t in ours.state_dict().items() if placed[n] == file}, tmp_path / file
        )
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": placed}))
    bring_in(open_source(tmp_path), tmp_path / "in")
    same(weights(tmp_path / "in"), ours.state_dict())


def test_mixed_types_become_fp32(tmp_path: Path) -> None:
    ours, theirs = twins(TINY)
    theirs.config.save_pretrained(tmp_path)
    mixed = {n: t.half() if "fc" in n else t.clone() for n, t in ours.state_dict().items()}
    save_file(mixed, tmp_path / "model.safetensors")
    assert bring_in(open_source(tmp_path), tmp_path / "in").dtype == "fp32"
    same(weights(tmp_path / "in"), {n: t.float() for n, t in mixed.items()})


def test_another_head_than_the_embedding_is_refused(tmp_path: Path) -> None:
    ours, theirs = twins(TINY)
    theirs.config.save_pretrained(tmp_path)
    named = {
        **ours.state_dict(),
        "lm_head.weight": ours.state_dict()["model.decoder.embed_tokens.weight"] + 1,
    }
    save_file(named, tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match=r"^tensor lm_head\.weight of .* is not the token embedding"):
        open_source(tmp_path)


def test_the_tokenizer_travels_along_and_transformers_reads_it(tmp_path: Path) -> None:
    words = tokenizer.train(
        iter(["def text(self): return self.text\n" * 20, "class Text:\n    pass\n"]), 300
    )
    path = tmp_path / "tokenizer.json"
    words.save(str(path))
    _, folder = exported(TINY, tmp_path, tokenizer=[path])
    assert (folder / "tokenizer.json").read_bytes() == path.read_bytes()
    theirs = AutoTokenizer.from_pretrained(folder)
    text = "class Text: é"
    assert theirs(text)["input_ids"] == words.encode(text).ids
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (2, 2, 1)
    assert bring_in(open_source(folder), tmp_path / "in").tokenizer
    assert (tmp_path / "in" / "tokenizer" / "tokenizer.json").read_bytes() == path.read_bytes()


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    _, folder = exported(TINY, tmp_path)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(BadInput, match=r"^--to=.*hf exists and is not empty"):
        export(TINY, tmp_path / "step-00000007", None, folder)
    with pytest.raises(BadInput, match=r"^--to=.*hf exists and is not empty"):
        bring_in(open_source(folder), folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    (tmp_path / "empty").mkdir()
    export(TINY, tmp_path / "step-00000007", None, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").exists()


def test_a_number_that_is_not_finite_leaves_no_half_folder(tmp_path: Path) -> None:
    model = drawn(TINY)
    with torch.no_grad():
        model.model.decoder.layers[1].fc2.weight[3, 5] = float("nan")
    folder = checkpoint_of(model, tmp_path / "step-00000007")
    with pytest.raises(
        BadInput, match=r"^tensor model\.decoder\.layers\.1\.fc2\.weight of .* not finite"
    ):
        export(TINY, folder, None, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000007"]


def test_a_number_too_large_for_fp16_is_named(tmp_path: Path) -> None:
    model = drawn(TINY)
    with torch.no_grad():
        model.model.decoder.layers[1].fc2.bias[3] = 7e4
    folder = checkpoint_of(model, tmp_path / "step-00000007")
    with pytest.raises(
        BadInput, match=r"^tensor model\.decoder\.layers\.1\.fc2\.bias of .* too large for fp16"
    ):
        export(TINY, folder, None, tmp_path / "hf", dtype="fp16")
    export(TINY, folder, None, tmp_path / "hf", dtype="bf16")


def test_a_flipped_byte_of_the_checkpoint_is_found(tmp_path: Path) -> None:
    folder = checkpoint_of(drawn(TINY), tmp_path / "step-00000007")
    [shard] = folder.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(BadInput, match="has a wrong checksum"):
        export(TINY, folder, None, tmp_path / "hf")


def test_a_checkpoint_of_another_model_is_named(tmp_path: Path) -> None:
    folder = checkpoint_of(drawn(TINY), tmp_path / "step-00000007")
    with pytest.raises(BadInput, match=r"^tensor model\.decoder\.layers\.2\..* is missing"):
        export(replace(TINY, layers=3), folder, None, tmp_path / "hf")
    with pytest.raises(
        BadInput, match=r"^tensor model\.decoder\.embed_tokens\.weight has shape \[512, 64\]"
    ):
        export(replace(TINY, vocab_size=513), folder, None, tmp_path / "hf")
