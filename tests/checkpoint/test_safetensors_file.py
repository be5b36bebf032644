"""A file written tensor by tensor is what the library writes and reads."""

import hashlib
import io
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file, save

from opt_train.checkpoint.durable_file import PIECE_BYTES, DurableFile
from opt_train.checkpoint.safetensors_file import DTYPES, write_safetensors


def of_every_kind() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {f"b.{dtype}": torch.randint(0, 2, (3, 5)).to(dtype) for dtype in DTYPES}
    return tensors | {
        "a scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 7),
        "not contiguous": torch.randn(6, 4).t(),
        "a view": torch.randn(10)[3:7],
        'é \u2028 "name"': torch.randn(2),
    }


def written(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    sink = io.BytesIO()
    write_safetensors(sink, tensors, metadata)
    return sink.getvalue()


def test_the_library_reads_the_same_tensors(tmp_path: Path) -> None:
    tensors = of_every_kind()
    path = tmp_path / "a.safetensors"
    path.write_bytes(written(tensors, {"two": "2", "one": "1"}))
    for read in (load_file(path), load(path.read_bytes())):
        assert read.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert read[name].dtype == tensor.dtype
            assert torch.equal(read[name], tensor)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"one": "1", "two": "2"}


def test_the_same_bytes_as_the_librarys() -> None:
    """With one entry of metadata, whose order the library does not fix."""
    tensors = {name: tensor.contiguous() for name, tensor in of_every_kind().items()}
    assert load(written(tensors, {"format": "pt"})).keys() == tensors.keys()
    some = {
        name: tensors[name] for name in ("a scalar", "empty", "b.torch.float32", "b.torch.float64")
    }
    assert written(some, {"format": "pt"}) == save(some, {"format": "pt"})


def test_the_order_of_the_tensors_does_not_matter() -> None:
    tensors = of_every_kind()
    back = dict(reversed(tensors.items()))
    assert written(tensors, {"a": "1", "b": "2"}) == written(back, {"b": "2", "a": "1"})


def test_a_type_that_the_format_does_not_know_is_an_error() -> None:
    with pytest.raises(KeyError, match="complex64"):
        written({"a": torch.zeros(1, dtype=torch.complex64)}, {})


def test_durable_file_has_the_hash_of_its_bytes_and_tells_what_is_durable(tmp_path: Path) -> None:

    content = torch.randint(0, 255, (2 * PIECE_BYTES + 1000,), dtype=torch.uint8).numpy().tobytes()
    told: list[int] = []
    with DurableFile(tmp_path / "a", told.append) as file:
        for start in range(0, len(content), PIECE_BYTES // 2 + 77):
            file.write(content[start : start + PIECE_BYTES // 2 + 77])
    assert (tmp_path / "a").read_bytes() == content
    assert file.size == len(content)
    assert file.sha256 == hashlib.sha256(content).hexdigest()
    assert told == sorted(told)
    assert told[-1] == len(content)
    assert len(told) >= 2
