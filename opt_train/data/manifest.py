"""What a folder of prepared data holds: `dataset.json` beside the token shards. Standard library
only."""

import json
import os
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from opt_train.protocol.exits import BadInput

DATASET_FILE = "dataset.json"
TOKENIZER_FILE = "tokenizer.json"
TRAIN = "train"
HELD_OUT = "validation"
SPLITS = (TRAIN, HELD_OUT)
"""The two parts of the corpus. A named validation set is a further split, called by its name."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of little-endian token ids; the shards of a split, in the manifest's order, are its
    token stream."""

    path: str
    """Relative to the dataset's folder."""
    split: str
    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class NamedSet:
    """A further text to measure the loss on."""

    name: str
    corpus: str
    """What the user named."""
    tokens: int
    documents: int
    left_out: int
    """Documents of the corpus that are not trained on because they are in this set."""


@dataclass(frozen=True, slots=True)
class DatasetManifest:
    """All that a run has to know of its data without opening a shard."""

    name: str
    fingerprint: str
    """sha256 over the ordered tokens of the corpus's two splits, their dtype and the tokenizer:
    equal means the same training. Named sets, from which nothing is learnt, are not in it."""
    tokenizer: str
    tokenizer_sha256: str
    """Of `tokenizer.json`."""
    vocab_size: int
    """Token ids are below this."""
    eos: int
    """Stands behind every document."""
    dtype: str
    """``uint16`` or ``uint32``; little-endian in the shards."""
    train_tokens: int
    validation_tokens: int
    documents: int
    unigram_perplexity: float
    """Of the validation tokens, under the train tokens' counts with one added to each: the bar for
    a trained model."""
    shards: tuple[Shard, ...]
    configuration: Mapping[str, str | int | float]
    """The keys that decided the tokens, with their values; another configuration does not reuse
    this folder."""
    sets: tuple[NamedSet, ...] = ()
    """Some may be other runs' that share the folder."""

    @property
    def splits(self) -> dict[str, int]:
        """Every split's tokens: the training ones, those held out, and each named set's."""
        return {
            TRAIN: self.train_tokens,
            HELD_OUT: self.validation_tokens,
            **{named.name: named.tokens for named in self.sets},
        }

    def shards_of(self, split: str) -> tuple[Shard, ...]:
        """The shards of a split, in order."""
        return tuple(shard for shard in self.shards if shard.split == split)

    def write(self, directory: Path) -> None:
        """Write `dataset.json` into `directory` and fsync it. The caller renames it or the folder
        into place."""
        with (directory / DATASET_FILE).open("w", encoding="utf-8") as file:
            json.dump(asdict(self), file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, directory: Path) -> Self:
        """The manifest of the prepared data in `directory`.

        Raises:
            BadInput: there is none, or it is damaged.
        """
        path = directory / DATASET_FILE
        try:
            payload: Any = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise BadInput(
                f"{path} does not exist; run `opt-train prepare` first or set data.directory to "
                "prepared data"
            ) from None
        except OSError as error:
            raise BadInput(
                f"{path} cannot be read ({error.strerror}); mend its permissions or its disk"
            ) from None
        except (ValueError, RecursionError) as error:
            raise _damaged(path, str(error)) from None
        try:
            values = _values(cls, payload)
            if not isinstance(values["shards"], list):
                raise ValueError("shards is not a list")
            values["shards"] = tuple(Shard(**_values(Shard, shard)) for shard in values["shards"])
            if not isinstance(values.get("sets", []), list):
                raise ValueError("sets is not a list")
            values["sets"] = tuple(
                NamedSet(**_values(NamedSet, named)) for named in values.get("sets", [])
            )
            manifest = cls(**values)
            _check_sound(manifest)
        except ValueError as error:
            raise _damaged(path, str(error)) from None
        return manifest


_KINDS: dict[Any, tuple[str, tuple[type, ...]]] = {
    str: ("text", (str,)),
    int: ("a whole number", (int,)),
    float: ("a number", (int, float)),
}
"""How JSON must hold a field of this type."""


def _values(kind: type["DatasetManifest | Shard | NamedSet"], payload: object) -> dict[str, Any]:
    """The fields of `kind` in `payload`. Fields of a newer version are left out: no reason to
    refuse its data; those with a default may be missing, as in an older version's.

    Raises:
        ValueError: one is missing or of another type.
    """
    if not isinstance(payload, dict):
        raise ValueError(f"{payload!r:.40} is not a JSON object")
    present = [field for field in fields(kind) if field.name in payload or field.default is MISSING]
    for field in present:
        if field.name not in payload:
            raise ValueError(f"{field.name} is missing")
        expected, types = _KINDS.get(field.type, ("", (object,)))
        value = payload[field.name]
        # A bool is an int to Python, and no count to us.
        if not isinstance(value, types) or (expected and isinstance(value, bool)):
            raise ValueError(f"{field.name} is not {expected}")
    return {field.name: payload[field.name] for field in present}


def _check_sound(manifest: DatasetManifest) -> None:
    """Check what the types do not say.

    Raises:
        ValueError: what is wrong.
    """
    if manifest.dtype not in ("uint16", "uint32"):
        raise ValueError("dtype is neither uint16 nor uint32")
    if not isinstance(manifest.configuration, dict) or not all(
        isinstance(value, str | int | float) for value in manifest.configuration.values()
    ):
        raise ValueError("configuration does not map keys to values")
    if manifest.vocab_size < 1 or manifest.eos < 0 or manifest.documents < 1:
        raise ValueError("a count is negative or zero")
    if len(manifest.splits) < len(SPLITS) + len(manifest.sets):
        raise ValueError("two sets have the same name")
    for split, tokens in manifest.splits.items():
        if sum(shard.tokens for shard in manifest.shards_of(split)) != tokens:
            raise ValueError(f"the {split} shards do not hold {tokens} tokens in all")
    width = {"uint16": 2, "uint32": 4}[manifest.dtype]
    for shard in manifest.shards:
        if shard.tokens < 1 or shard.bytes != shard.tokens * width:
            raise ValueError(f"the tokens and bytes of {shard.path} do not agree")


def _damaged(path: Path, why: str) -> BadInput:
    return BadInput(
        f"{path} is damaged ({why}); delete the folder {path.parent} and run `opt-train prepare` "
        "again"
    )


def check_fits(manifest: DatasetManifest, *, vocab_size: int, sequence_length: int) -> None:
    """Check the data against the model that is to read it.

    Raises:
        BadInput: token ids that the model's embedding has no row for, or a split shorter than one
            sequence.
    """
    if manifest.vocab_size > vocab_size:
        raise BadInput(
            f"model.vocab_size={vocab_size} is smaller than the {manifest.vocab_size} entries of "
            "tokenizer "
            f"{manifest.tokenizer!r} that prepared data.name={manifest.name!r}; "
            f"use model.vocab_size={manifest.vocab_size} or more"
        )
    for split in SPLITS:
        tokens = manifest.splits[split]
        if tokens < sequence_length + 1:
            raise BadInput(
                f"data.sequence_length={sequence_length} needs {sequence_length + 1} tokens but "
                f"the {split} split of "
                f"data.name={manifest.name!r} has {tokens}; use a shorter sequence or a larger "
                "corpus"
            )
