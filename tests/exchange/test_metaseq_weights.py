"""metaseq's consolidated checkpoint, written here as its conversion script for Hugging Face
describes it."""

import argparse
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from opt_train.config.compose import compose
from opt_train.exchange.checkpoint import weights_in
from opt_train.exchange.importing import bring_in
from opt_train.exchange.sources import open_source
from opt_train.model.config import ModelConfig
from opt_train.model.decoder import OPT
from opt_train.protocol.exits import BadInput
from tests.exchange.weights import drawn
from tests.model.twins import TINY, VARIANTS


def consolidated(model: OPT) -> dict[str, torch.Tensor]:
    """Our weights by metaseq's names: keys, values and queries in one matrix, in this order."""
    weights: dict[str, torch.Tensor] = {"decoder.version": torch.tensor([3.0])}
    ours = model.state_dict()
    for name, own in ours.items():
        short = name.removeprefix("model.decoder.")
        if ".v_proj." in short or ".q_proj." in short:
            continue
        if ".k_proj." in short:
            parts = [ours[name.replace("k_proj", part)] for part in ("k_proj", "v_proj", "q_proj")]
            weights[f"decoder.{short.replace('k_proj', 'qkv_proj')}"] = torch.cat(parts)
            continue
        short = short.replace("project_in.", "project_in_dim.").replace(
            "project_out.", "project_out_dim."
        )
        if short.startswith("final_layer_norm."):
            short = short.replace("final_", "")
        weights[f"decoder.{short}"] = own
    weights["decoder.output_projection.weight"] = weights["decoder.embed_tokens.weight"]
    return weights


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_every_tensor_finds_its_place(config: ModelConfig, tmp_path: Path) -> None:
    ours = drawn(config)
    record = argparse.Namespace(decoder_attention_heads=config.heads)
    torch.save({"model": consolidated(ours), "args": record}, tmp_path / "consolidated.pt")
    source = open_source(tmp_path / "consolidated.pt")
    assert source.kind == "metaseq"
    done = bring_in(source, tmp_path / "in")
    assert (done.model.heads, done.model.layer_norm) == (config.heads, config.layer_norm)
    assert done.model.embedding_width == config.embedding_width
    found = weights_in(tmp_path / "in", None)
    assert found.keys() == ours.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(found[name].read(), tensor), name


def test_heads_come_from_the_preset_or_are_asked_for(tmp_path: Path) -> None:
    torch.save(consolidated(drawn(TINY)), tmp_path / "consolidated.pt")
    with pytest.raises(
        BadInput, match="does not tell its number of heads; name the model, as --model opt-125m"
    ):
        open_source(tmp_path)
    assert open_source(tmp_path, preset=replace(TINY, heads=2)).model.heads == 2
    with pytest.raises(
        BadInput, match=r"has d_model=64 where --model=opt-125m has 768|has layers=2 where"
    ):
        open_source(tmp_path, "metaseq", compose(["model=opt-125m"]).model)


def test_a_vocabulary_that_was_not_padded_yet_gets_rows_of_zeros(tmp_path: Path) -> None:
    ours = drawn(replace(TINY, vocab_size=505))
    torch.save({"model": consolidated(ours)}, tmp_path / "consolidated.pt")
    bring_in(open_source(tmp_path, preset=TINY), tmp_path / "in")
    found = weights_in(tmp_path / "in", None)["model.decoder.embed_tokens.weight"].read()
    assert torch.equal(found[:505], ours.state_dict()["model.decoder.embed_tokens.weight"])
    assert found.shape[0] == TINY.vocab_size
    assert not found[505:].any()


def test_what_does_not_belong_is_named(tmp_path: Path) -> None:
    weights = consolidated(drawn(TINY))
    path = tmp_path / "consolidated.pt"

    def refused(changed: dict[str, torch.Tensor], why: str) -> None:
        torch.save({"model": changed}, path)
        with pytest.raises(BadInput, match=why):
            bring_in(open_source(path, preset=TINY), tmp_path / "in")
        assert not (tmp_path / "in").exists()

    refused(
        {**weights, "encoder.x": torch.zeros(1)},
        "'encoder.x', which is no tensor of metaseq's decoder",
    )
    refused(
        {**weights, "decoder.layers.0.more": torch.zeros(1)},
        r"layers\.0\.more of .* belongs to no part",
    )
    refused(
        {**weights, "decoder.output_projection.weight": torch.zeros(1)},
        "only models with a tied head",
    )
    refused(
        {n: t for n, t in weights.items() if "1.fc1.bias" not in n},
        r"layers\.1\.fc1\.bias is missing",
    )
    odd = {**weights, "decoder.layers.0.self_attn.qkv_proj.bias": torch.zeros(191)}
    refused(odd, r"shape \[191\], which is no k, v and q")
    bad = {**weights, "decoder.layer_norm.bias": torch.full((64,), float("inf"))}
    refused(bad, r"final_layer_norm\.bias of .* not finite")
