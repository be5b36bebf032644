"""What must be true before a run may begin or go on here: of the folder, the data and the weights.

Each check raises `BadInput`, a sentence that names what to change. What nodes can hold, their
cluster checks (`clusters/cluster.py`)."""

import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from opt_logbook.record import journal
from opt_logbook.record.events import Event, JournalDamaged, RunCreated
from opt_logbook.record.run_directory import RunDirectory

from opt_train.config.run_config import RunConfig
from opt_train.data.manifest import TOKENIZER_FILE, DatasetManifest, check_fits
from opt_train.data.prepared import check_prepared_by
from opt_train.exchange.imported import check_initial_weights, check_same_tokenizer
from opt_train.model.sizes import parameter_count
from opt_train.protocol.exits import BadInput

BYTES_PER_PARAMETER = 12
"""Of a checkpoint: the weight and AdamW's two moments, each in fp32."""


def check_weights_fit_model(config: RunConfig) -> None:
    """Check that a new run can begin with `train.initial_weights`.

    Raises:
        BadInput: they are not there, of another model, or came with another tokenizer than the one
            named.
    """
    if config.train.initial_weights:
        folder = Path(config.train.initial_weights)
        check_initial_weights(folder, config.model)
        if config.tokenizer.vocab_file:  # known before the data is prepared, which may take hours
            check_same_tokenizer(folder, config.tokenizer)


def check_weights_fit_data(config: RunConfig) -> None:
    """Check that `train.initial_weights` know the ids of a new run's data, which is prepared.

    Raises:
        BadInput: they came with another tokenizer.
    """
    if config.train.initial_weights:
        check_same_tokenizer(
            Path(config.train.initial_weights), Path(config.data.directory, TOKENIZER_FILE)
        )


def admitted_data(directory: RunDirectory, config: RunConfig) -> DatasetManifest:
    """The manifest of the prepared data, which is the one that this run reads.

    Raises:
        BadInput: another configuration prepared it, its sequences or ids do not fit the model, or
            the run began with other tokens.
    """
    folder = Path(config.data.directory)
    manifest = DatasetManifest.read(folder)
    check_prepared_by(manifest, config.data, config.tokenizer, folder)
    check_fits(
        manifest, vocab_size=config.model.vocab_size, sequence_length=config.data.sequence_length
    )
    check_same_data(directory, manifest)
    return manifest


def check_same_data(directory: RunDirectory, manifest: DatasetManifest) -> None:
    """Refuse to go on with other tokens than the run began with.

    Raises:
        BadInput: the data's fingerprint has changed.
    """
    for entry in journal.read(directory.journal).entries[:1]:
        event = entry.event
        if isinstance(event, RunCreated) and event.data_fingerprint not in (
            "",
            manifest.fingerprint,
        ):
            raise BadInput(
                f"data.directory holds other tokens than those {directory.path} was trained on "
                f"({manifest.fingerprint[:12]} instead of {event.data_fingerprint[:12]}); prepare "
                "the same corpus again"
            )


def damage_question(run: RunDirectory, repairs: Sequence[Event]) -> str:
    """What a person must decide about a journal with these repairs; empty where nothing in it is
    damaged."""
    lines = "; ".join(
        f"line {event.line}: {event.why}" for event in repairs if isinstance(event, JournalDamaged)
    )
    return lines and (
        f"{run.journal} is damaged ({lines}), and what stood there is forgotten: perhaps a failed "
        "node or checkpoint; restore the file from a copy, or start the same command again to go "
        "on without"
    )


def check_room(directory: RunDirectory, config: RunConfig) -> None:
    """Refuse a new run where its directory cannot be made or its checkpoints cannot lie.

    Raises:
        BadInput: the folder cannot be written, or has too little space for the checkpoints to be
            kept.
    """
    above = next(p for p in directory.path.parents if p.exists())
    if not above.is_dir():
        raise BadInput(f"runs={config.runs} is not a folder; choose another")
    if not os.access(above, os.W_OK | os.X_OK):
        raise BadInput(
            f"runs={config.runs} cannot be written to; mend the permissions of {above} or choose "
            "another runs="
        )
    free = shutil.disk_usage(above).free
    parameters = parameter_count(config.model)
    kept = config.checkpoint.most_kept(config.train.steps)
    needed = BYTES_PER_PARAMETER * parameters * (kept + 1)
    if free < needed:
        raise BadInput(
            f"runs={config.runs} has {_size(free)} free, but {kept} checkpoints of {parameters:,} "
            f"parameters and the next one take {_size(needed)}; make space or choose another runs="
        )


def _size(count: int) -> str:
    value, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"


def unwritable(directory: RunDirectory, error: OSError) -> BadInput:
    mend = "make space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "mend its permissions"
    return BadInput(
        f"{directory.path} cannot be written ({error.strerror}); {mend} or choose another runs="
    )
