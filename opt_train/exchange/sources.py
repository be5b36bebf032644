"""Weights that others wrote: Hugging Face folders (safetensors, old torch bins) and metaseq's
consolidated file.

A torch file is a pickle. It is read by torch's own restricted reader, which knows tensors,
containers and numbers and calls nothing else, so that nothing a file says is executed; its tensors
stay on the disk until they are wanted.
"""

import argparse
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from opt_train.exchange import metaseq
from opt_train.exchange.configuration import from_hugging_face
from opt_train.exchange.safetensors_file import open_safetensors
from opt_train.exchange.stored_tensor import StoredTensor
from opt_train.model.config import ModelConfig
from opt_train.protocol.exits import BadInput

CONFIG = "config.json"
SAFETENSORS, BIN = "model.safetensors", "pytorch_model.bin"
INDEX = ".index.json"
"""Behind the name of the single file: which tensor is in which file, where there are several."""

# A limit against hostile files: an index of 10,000 tensors takes about a megabyte.
LARGEST_JSON = 1 << 26

HEAD = "lm_head.weight"
"""The tied head, which old files hold a second time."""

EMBEDDING = "model.decoder.embed_tokens.weight"


@dataclass(frozen=True, slots=True)
class Source:
    """A model in somebody's files."""

    path: Path
    kind: str
    """``safetensors``, ``bin`` or ``metaseq``."""
    model: ModelConfig
    tensors: Mapping[str, StoredTensor]
    """By Hugging Face's names; the head is not among them."""


def open_source(path: Path, kind: str = "", preset: ModelConfig | None = None) -> Source:
    """Look into a folder or file without reading its tensors.

    Args:
        path: a Hugging Face folder; or metaseq's consolidated file, or a folder that holds one
            alone.
        kind: ``huggingface`` or ``metaseq``; empty: by what is there.
        preset: the model that it must be, for a file that does not tell; None: what the files say.

    Raises:
        BadInput: something is missing, damaged or no OPT model.
    """
    if not path.exists():
        raise BadInput(
            f"{path} does not exist; give a Hugging Face folder or metaseq's consolidated file"
        )
    single = _consolidated(path, kind)
    if single is not None:
        model, tensors = metaseq.model_and_tensors(single, load_torch_file(single), preset)
        return Source(single, "metaseq", model, tensors)
    config = path / CONFIG
    model = from_hugging_face(config, read_json(config))
    kind, tensors = _hugging_face(path)
    if (
        preset is not None
        and replace(preset, name=model.name, dropout=model.dropout, init_std=model.init_std)
        != model
    ):
        raise BadInput(
            f"{config} describes another model than --model={preset.name}; leave --model out"
        )
    return Source(path, kind, model, _without_head(_full_names(tensors)))


def _consolidated(path: Path, kind: str) -> Path | None:
    """metaseq's file, if it is that."""
    if kind == "huggingface":
        return None
    if path.is_file():
        return path
    found = sorted(path.glob("*.pt"))
    if kind == "metaseq" or (found and not (path / CONFIG).exists()):
        if len(found) != 1:
            raise BadInput(f"{path} holds {len(found)} .pt files; name the consolidated one")
        return found[0]
    return None


def _hugging_face(folder: Path) -> tuple[str, dict[str, StoredTensor]]:
    """Every tensor of a folder, of the better of its two formats."""
    # safetensors first: such a file can carry no code, and is read by offset.
    for kind, single in (("safetensors", SAFETENSORS), ("bin", BIN)):
        if (folder / single).exists():
            return kind, _tensors_of(kind, folder / single)
        index = folder / (single + INDEX)
        if index.exists():
            return kind, _sharded(kind, index)
    raise BadInput(
        f"{folder} holds neither {SAFETENSORS} nor {BIN}, whole or with an index; get the weights "
        "too"
    )


def _sharded(kind: str, index: Path) -> dict[str, StoredTensor]:
    placed = read_json(index).get("weight_map")
    if (
        not isinstance(placed, dict)
        or not placed
        or not all(isinstance(name, str) for name in placed.values())
    ):
        raise BadInput(f"{index} has no weight_map from tensors to files; get it again")
    tensors: dict[str, StoredTensor] = {}
    for name in sorted(set(placed.values())):
        # An index is somebody's text: a path that leads elsewhere must not be opened (invariant
        # 13).
        if PurePosixPath(name).name != name or name in ("", ".", ".."):
            raise BadInput(
                f"{index} names {name!r}, which is not a file beside it; do not use this folder"
            )
        for tensor, stored in _tensors_of(kind, index.parent / name).items():
            if placed.get(tensor) != name:
                raise BadInput(
                    f"tensor {tensor} of {index.parent / name} is not there by {index}; get both "
                    "again"
                )
            tensors[tensor] = stored
    if missing := sorted(placed.keys() - tensors.keys()):
        raise BadInput(
            f"tensor {missing[0]} is not in {placed[missing[0]]}, where {index} has it; get both "
            "again"
        )
    return tensors


def _tensors_of(kind: str, path: Path) -> dict[str, StoredTensor]:
    if not path.is_file():
        raise BadInput(f"{path} is missing; get the whole folder")
    if kind == "safetensors":
        _, tensors = open_safetensors(path)
        return tensors
    loaded = load_torch_file(path)
    if not isinstance(loaded, Mapping):
        raise BadInput(f"{path} holds no tensors by name; give {BIN} as Hugging Face writes it")
    return in_memory(path, loaded.items())


def in_memory(path: Path, named: Iterable[tuple[object, object]]) -> dict[str, StoredTensor]:
    """Tensors of a torch file, mapped and not yet read."""
    tensors = {}
    for name, tensor in named:
        plain = (
            isinstance(tensor, torch.Tensor)
            # A sparse one may claim a shape that no bytes stand behind.
            and tensor.layout == torch.strided
            and tensor.device.type == "cpu"
        )
        if not plain or not isinstance(name, str):
            raise BadInput(
                f"{path} holds {str(name)[:80]!r}, which is no plain tensor; give a file of "
                "weights alone"
            )
        assert isinstance(tensor, torch.Tensor)
        tensors[name] = StoredTensor(path, tuple(tensor.shape), tensor.dtype, tensor.detach)
    return tensors


def load_torch_file(path: Path) -> Any:
    """What `torch.save` wrote, if that is tensors, containers and numbers (and argparse's plain
    record of them).

    Raises:
        BadInput: the file is cut, or asks for anything else. Nothing of what it asks for is called.
    """
    if not path.is_file():
        raise BadInput(f"{path} is no file; give the weights")
    try:
        # metaseq's files hold such a record; to build one runs nothing of the file's.
        with torch.serialization.safe_globals([argparse.Namespace]):
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                # Files of torch before 1.6 cannot be mapped, and are read whole.
                return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise BadInput(
            f"{path} cannot be read: {error.strerror or error}; mend it and try again"
        ) from None
    except Exception as error:  # whatever a hostile or cut file makes the reader raise
        if "Weights only load failed" in str(error):
            raise BadInput(
                f"{path} holds more than tensors and numbers, or is damaged; nothing of it was "
                "executed, "
                "give another file"
            ) from None
        raise BadInput(
            f"{path} is no whole file of torch's ({_first_line(error)}); get it again"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        BadInput: there is none.
    """
    try:
        if not path.is_file():
            raise BadInput(f"{path} is missing; get the whole folder")
        if path.stat().st_size > LARGEST_JSON:
            raise BadInput(
                f"{path} has {path.stat().st_size} bytes, which is no description of a model; get "
                "it again"
            )
        payload = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}; mend it and try again") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is no JSON ({_first_line(error)}); get it again") from None
    if not isinstance(payload, dict):
        raise BadInput(f"{path} is no JSON object; get it again")
    return payload


def _full_names(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Some of the published files begin at `decoder.`: they were saved without their head."""
    return {
        (f"model.{name}" if name.startswith("decoder.") else name): stored
        for name, stored in tensors.items()
    }


def _without_head(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Leave out the head, which must be the token embedding.

    Raises:
        BadInput: it is another one.
    """
    head, embedding = tensors.pop(HEAD, None), tensors.get(EMBEDDING)
    if head is not None and embedding is not None and not same(head, embedding):
        raise BadInput(
            f"tensor {HEAD} of {head.where} is not the token embedding; only models with a tied "
            "head work"
        )
    return tensors


def same(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors hold the same bytes."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    # As bytes: by value NaN differs from itself, and 0.0 equals -0.0.
    return torch.equal(
        one.read().contiguous().view(torch.uint8), other.read().contiguous().view(torch.uint8)
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:120]
