"""What an imported checkpoint tells of its model. Without torch: a run's start asks here too."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opt_train.checkpoint import manifest
from opt_train.checkpoint.manifest import STATE, CheckpointError, Manifest
from opt_train.data.config import TokenizerConfig
from opt_train.exchange import tokenizer_files
from opt_train.model.config import ModelConfig
from opt_train.protocol.exits import BadInput

ATTEMPT = "imported"
"""In the manifest, where a run's checkpoint has its attempt."""

WEIGHTS = ("fp32", "bf16", "fp16")

NO_SHAPE = {"name", "dropout", "init_std"}
"""Keys of a model that change no tensor's shape, and so may differ from those that weights came
with."""


def is_imported(committed: Manifest) -> bool:
    """Whether a checkpoint tells its model itself, and belongs to no run."""
    return committed.attempt == ATTEMPT and "model" in committed.state


def model_of(folder: Path, committed: Manifest) -> tuple[ModelConfig, str]:
    """The model of an imported checkpoint, and the type of its weights.

    Raises:
        BadInput: its state does not tell.
    """
    values: Any = committed.state.get("model")
    weights = committed.state.get("weights")
    try:
        model = ModelConfig(**values)
        wrong = [
            f.name
            for f in dataclasses.fields(model)
            if type(getattr(model, f.name)) is not type(f.default)
        ]
    except TypeError:
        wrong = ["model"]
    if wrong or not isinstance(values, Mapping) or weights not in WEIGHTS:
        raise BadInput(
            f"{folder / STATE} does not tell the model ({', '.join(wrong) or 'weights'}); import "
            "it again"
        )
    return model, str(weights)


def check_initial_weights(folder: Path, model: ModelConfig) -> None:
    """Check, as far as the manifest tells, that a run of `model` can begin from the checkpoint in
    `folder`.

    Raises:
        BadInput: there is no checkpoint, or it is of another model.
    """
    try:
        committed = manifest.read(folder)
        manifest.check_sizes(folder, committed)
    except CheckpointError as error:
        raise BadInput(
            f"train.initial_weights={folder} is no whole checkpoint: {error}; name another"
        ) from None
    if not is_imported(committed):
        return  # a run's own: the ranks compare the tensors
    theirs, _ = model_of(folder, committed)
    for field in dataclasses.fields(model):
        key = "embedding_width" if field.name == "embed_dim" else field.name
        found, wanted = getattr(theirs, key), getattr(model, key)
        if field.name not in NO_SHAPE and found != wanted:
            raise BadInput(
                f"train.initial_weights={folder} has model.{field.name}={found!r} and the "
                f"configuration {wanted!r}; "
                f"use model.{field.name}={found}, or other weights"
            )


def check_same_tokenizer(folder: Path, other: TokenizerConfig | Path) -> None:
    """Check that the tokenizer that came with the weights in `folder`, if one did, gives the ids
    that a run reads.

    Args:
        other: what the run's data is prepared with: GPT-2's two files, or a `tokenizer.json`.

    Raises:
        BadInput: each id would mean another text than the weights were trained on.
    """
    own = folder / tokenizer_files.FOLDER
    if not tokenizer_files.tokenizer_files(own) or tokenizer_files.same_ids(own, other):
        return
    fix = "use data that was prepared with the weights' own"
    vocabulary, merges = own / tokenizer_files.VOCABULARY, own / tokenizer_files.MERGES
    if vocabulary.is_file() and merges.is_file():
        fix = f"use tokenizer=gpt2 tokenizer.vocab_file={vocabulary} tokenizer.merges_file={merges}"
    theirs = other if isinstance(other, Path) else other.vocab_file
    raise BadInput(
        f"train.initial_weights={folder} came with another tokenizer ({own}) than the data's "
        f"({theirs}), "
        f"so each id would mean another text; {fix}, or other weights"
    )
