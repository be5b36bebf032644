"""Cut, forged and hostile files are one sentence, nothing of them is executed, and no folder is
left."""

import io
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from opt_train.cli import main as cli
from tests.exchange.weights import drawn
from tests.model.twins import TINY, hugging_face


class Bomb:
    """Unpickled, it makes a folder: the sign that something was executed."""

    def __init__(self, sign: Path) -> None:
        self.sign = sign

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.sign),)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    hugging_face(TINY).config.save_pretrained(folder)
    save_file(drawn(TINY).state_dict(), folder / "model.safetensors")
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "hf"))


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Imports and returns the one sentence that it must be refused with."""

    def run(source: Path, *flags: str) -> str:
        before = sorted(tmp_path.iterdir())
        capsys.readouterr()
        code = cli.main(["import", str(source), "--to", str(tmp_path / "in"), *flags])
        said = capsys.readouterr()
        assert (code, said.out) == (2, ""), said
        assert said.err.count("\n") == 1
        assert sorted(tmp_path.iterdir()) == before
        return said.err

    return run


def forge(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the header of a safetensors file and nothing else."""
    content = path.read_bytes()
    [length] = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


FC2 = "model.decoder.layers.1.fc2.bias"


def test_a_good_folder_is_taken(folder: Path, tmp_path: Path) -> None:
    assert cli.main(["import", str(folder), "--to", str(tmp_path / "in"), "--json"]) == 0


def test_a_cut_file_is_refused_wherever_it_is_cut(
    folder: Path, refused: Callable[..., str]
) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 5, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert "is no whole safetensors file" in refused(folder)
    path.write_bytes(whole + b"\0")
    assert "is no whole safetensors file" in refused(folder)


@pytest.mark.parametrize("length", [0, 1, 1 << 40, (1 << 64) - 1])
def test_a_forged_length_reads_nothing(
    length: int, folder: Path, refused: Callable[..., str]
) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    assert "is no whole safetensors file (its header is" in refused(folder)


@pytest.mark.parametrize(
    "header", [b"[]", b"[" * 100_000, b"9" * 5000, b'{"a":1,"a":2}', b"\xff\xfe", b'{"a":{}}']
)
def test_a_header_that_is_none_is_refused(
    header: bytes, folder: Path, refused: Callable[..., str]
) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert "is no whole safetensors file" in refused(folder)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda h: h[FC2].update(data_offsets=[0, 256]), "is the end of the one before"),
        (lambda h: h[FC2].update(data_offsets=[-256, 0]), "are no whole numbers"),
        (lambda h: h[FC2].update(data_offsets=[1 << 60, (1 << 60) + 256]), "lies at bytes"),
        (lambda h: h[FC2].update(shape=[65]), "do not fit"),
        (lambda h: h[FC2].update(shape=[True]), "are no whole numbers"),
        (lambda h: h[FC2].update(shape=[1 << 62, 1 << 62]), "do not fit"),
        (lambda h: h[FC2].update(dtype="F8_E5M2"), "has type F8_E5M2"),
        (lambda h: h[FC2].update(dtype="I32"), "give it in fp32, bf16 or fp16"),
        (lambda h: h[FC2].update(dtype=["F32"]), "has type ['F32']"),
        (lambda h: h[FC2].update(shape=[8, 8]), "has shape [8, 8] in"),
        (lambda h: h.update({FC2 + "x": h.pop(FC2)}), f"tensor {FC2} is missing in"),
        (lambda h: h.update({"__metadata__": {"a": 1}}), "does not hold texts"),
    ],
)
def test_a_forged_header_is_named(
    change: Callable[[dict[str, Any]], None], why: str, folder: Path, refused: Callable[..., str]
) -> None:
    forge(folder / "model.safetensors", change)
    assert why in refused(folder)


def test_too_much_and_not_finite_are_named(folder: Path, refused: Callable[..., str]) -> None:
    weights = drawn(TINY).state_dict()
    save_file({**weights, "more": torch.zeros(2)}, folder / "model.safetensors")
    assert "tensor more of" in refused(folder)
    weights[FC2][5] = float("nan")
    save_file(weights, folder / "model.safetensors")
    assert f"tensor {FC2} of {folder}/model.safetensors has a number that is not finite" in refused(
        folder
    )


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "..", ".", "a/b.safetensors", ""]
)
def test_an_index_leads_nowhere_else(name: str, folder: Path, refused: Callable[..., str]) -> None:
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    names = dict.fromkeys(drawn(TINY).state_dict(), "part.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {**names, FC2: name}}))
    assert "which is not a file beside it" in refused(folder)


def test_an_index_that_lies_is_refused(folder: Path, refused: Callable[..., str]) -> None:
    index = folder / "model.safetensors.index.json"
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    names = dict.fromkeys(drawn(TINY).state_dict(), "part.safetensors")
    for payload, why in (
        ({}, "has no weight_map"),
        ({"weight_map": {**names, FC2: 3}}, "has no weight_map"),
        ({"weight_map": {**names, FC2: "other.safetensors"}}, "other.safetensors is missing"),
        (
            {"weight_map": {**names, "more": "part.safetensors"}},
            "tensor more is not in part.safetensors",
        ),
        ({"weight_map": {n: f for n, f in names.items() if n != FC2}}, f"tensor {FC2} of"),
    ):
        index.write_text(json.dumps(payload))
        assert why in refused(folder)
    index.write_text("[" * 100_000)
    assert "is no JSON" in refused(folder)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.pt"])
def test_a_pickle_with_code_is_not_executed(
    name: str, old: bool, folder: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (folder / "model.safetensors").unlink()
    sign = tmp_path / "sign"
    torch.save({FC2: Bomb(sign)}, folder / name, _use_new_zipfile_serialization=not old)
    source = folder if name.endswith(".bin") else folder / name
    assert "nothing of it was executed" in refused(source)
    assert not sign.exists()
    torch.load(folder / name, weights_only=False)
    assert sign.exists(), "the bomb goes off where it is let"


def test_a_damaged_torch_file_is_one_sentence(folder: Path, refused: Callable[..., str]) -> None:
    (folder / "model.safetensors").unlink()
    buffer = io.BytesIO()
    torch.save(drawn(TINY).state_dict(), buffer)
    path, whole = folder / "pytorch_model.bin", buffer.getvalue()
    for content in (
        b"",
        b"\x80\x02.",
        b"rubbish" * 100,
        whole[:1000],
        whole[: len(whole) // 2],
        whole[:-1000],
    ):
        path.write_bytes(content)
        assert str(path) in refused(folder)
    for payload in ([1, 2], {"a": 3}, {3: torch.zeros(1)}, {FC2: torch.zeros(3).to_sparse()}):
        torch.save(payload, path)
        assert str(path) in refused(folder)


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"model_type": "llama"}, "only OPT models can be imported"),
        ({"hidden_size": -1}, "has hidden_size=-1, which is no size"),
        ({"num_hidden_layers": 10**12}, "has num_hidden_layers=1000000000000, which is no size"),
        (
            {"num_hidden_layers": 1 << 24},
            "tensor model.decoder.layers.2.self_attn.k_proj.weight is missing",
        ),
        ({"num_attention_heads": 3}, "does not divide"),
        ({"activation_function": "gelu"}, "only 'relu' works"),
        ({"enable_bias": False}, "only True works"),
        ({"tie_word_embeddings": False}, "only True works"),
        ({"do_layer_norm_before": "no"}, "neither true nor false"),
        ({"dropout": "x"}, "does not lie between 0 and 1"),
    ],
)
def test_a_model_that_is_not_ours_is_named(
    values: dict[str, Any], why: str, folder: Path, refused: Callable[..., str]
) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    assert why in refused(folder)


def test_what_is_missing_is_said(folder: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "does not exist" in refused(tmp_path / "nothing")
    assert "--from=onnx is not possible" in refused(folder, "--from", "onnx")
    assert "model=x does not exist" in refused(folder, "--model", "x")
    assert "is no model's name" in refused(folder, "--model", "x seed=1")
    assert "describes another model than --model=opt-125m" in refused(folder, "--model", "opt-125m")
    (folder / "model.safetensors").unlink()
    assert "holds neither model.safetensors nor pytorch_model.bin" in refused(folder)
    (folder / "model.safetensors").mkdir()
    assert "is missing" in refused(folder)
    (folder / "config.json").unlink()
    assert "config.json is missing" in refused(folder)
    os.mkfifo(folder / "config.json")
    assert "config.json is missing" in refused(folder)
