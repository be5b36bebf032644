"""What this start is in the life of its run, and what a lineage keeps: its configuration and code.

A lineage is one training configuration and one code. Each keeps a copy of both under
`code/<lineage>/`, and a start is compared with that copy: what differs is refused, or opens the
next lineage where a person asked for it.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from opt_logbook.record import journal
from opt_logbook.record.durable_file import replace_file
from opt_logbook.record.events import (
    JournalDamaged,
    JournalRepaired,
    LineageOpened,
    Note,
    RunFinished,
)
from opt_logbook.record.run_directory import RunDirectory

from opt_train.config.compose import to_yaml
from opt_train.config.difference import difference
from opt_train.config.run_config import RunConfig, from_json, to_json
from opt_train.data.prepared import directory_of
from opt_train.protocol.exits import BadInput
from opt_train.run.admission import unwritable
from opt_train.run.checkpoint import MEMORY, NODE, SHARED
from opt_train.run.code_state import code_difference, copy_code

REMARKS = (Note, JournalRepaired, JournalDamaged)
"""Lines that anybody may add to a run at rest; it stays what it was."""


@dataclass(frozen=True, slots=True)
class RunStart:
    """What this start is in the life of the run."""

    lineage: int
    """The lineage it trains in."""
    opens_lineage: bool
    lineage_difference: tuple[str, ...]
    operational_difference: tuple[str, ...]
    is_new: bool
    is_finished: bool


def resolve(config: RunConfig) -> tuple[RunDirectory, RunConfig]:
    """The run's directory, and the configuration as it is kept there: without the request for a
    lineage, and with the full paths of the data and of initial weights, so that ranks find them
    wherever their agent was started."""
    data = directory_of(config.data, config.tokenizer).absolute()
    resolved = replace(config, lineage="", data=replace(config.data, directory=str(data)))
    if weights := config.train.initial_weights:
        resolved = replace(
            resolved, train=replace(config.train, initial_weights=str(Path(weights).absolute()))
        )
    return RunDirectory(Path(config.runs, config.name).absolute()), resolved


def classify_start(directory: RunDirectory, config: RunConfig, asked_for_lineage: bool) -> RunStart:
    """Compare `config` and the code that runs with what the run directory says was trained there.

    Raises:
        BadInput: fixed keys differ; training keys or code differ and no new lineage was asked for;
            the folder is none of ours; a lineage was asked for where there is nothing to go on
            from; the journal is too damaged to tell.
    """
    reading = journal.read(directory.journal)
    entries = reading.entries
    lineages = [entry.event.lineage for entry in entries if isinstance(entry.event, LineageOpened)]
    if not lineages:
        if reading.damaged:
            lines = ", ".join(str(damage.line) for damage in reading.damaged)
            raise BadInput(
                f"{directory.journal} is damaged (line {lines}), and no line is left that tells "
                "what was trained here; "
                "restore it from a copy, or choose another name="
            )
        if (left := _left_by_training(directory)) or (not entries and journal.read_head(directory)):
            raise BadInput(
                f"{directory.journal} no longer tells what was trained here, though "
                f"{left or directory.head} is there; "
                "restore journal.jsonl and journal.head from a copy, or choose another name="
            )
        if asked_for_lineage:
            raise BadInput(f"lineage=new has nothing to go on from: {directory.path} holds no run")
        if not directory.config_json.exists() and _strangers_in(directory):
            raise BadInput(
                f"{directory.path} exists and is no run directory; choose another name= or runs=, "
                "or remove it if nothing in it is wanted"
            )
        return RunStart(1, False, (), (), is_new=True, is_finished=False)
    # A lineage's own copy is compared, not the newest configuration: a crash between writing that
    # and journalling the new lineage must not make the change look as if it had been agreed to.
    kept = _code_of(directory, lineages[-1])
    began_with = difference(_read(kept / "config.json"), config)
    if began_with.fixed:
        raise BadInput(
            f"{directory.path} was trained with another model or other data "
            f"({'; '.join(began_with.fixed)}), "
            "which nothing trained there fits; choose another name="
        )
    training = began_with.training
    operational = difference(_read(directory.config_json), config).operational
    last = next(entry.event for entry in reversed(entries) if not isinstance(entry.event, REMARKS))
    if not training and isinstance(last, RunFinished):
        # Nothing will be computed any more, so newer code changes nothing.
        return RunStart(lineages[-1], False, (), operational, is_new=False, is_finished=True)
    changed = (*training, *code_difference(kept))
    if changed and not asked_for_lineage:
        what, this = (
            ("another configuration", "this one") if training else ("other code", "this code")
        )
        raise BadInput(
            f"{directory.path} was trained with {what} ({'; '.join(changed)}); "
            f"add lineage=new to go on from its newest checkpoint with {this}, or choose another "
            "name="
        )
    lineage = lineages[-1] + bool(changed)
    return RunStart(lineage, bool(changed), changed, operational, is_new=False, is_finished=False)


def _strangers_in(directory: RunDirectory) -> bool:
    """Whether the folder holds more than a start leaves that came no further than its lock, or its
    way to Slurm."""
    return directory.path.exists() and any(
        path not in (directory.lock, directory.submit) for path in directory.path.iterdir()
    )


def _left_by_training(directory: RunDirectory) -> Path | None:
    """A file that is there only where ranks have trained."""
    folders = [
        directory.metrics,
        *(directory.checkpoints_of(tier) for tier in (SHARED, MEMORY, NODE)),
    ]
    return next((path for folder in folders for path in folder.rglob("*") if path.is_file()), None)


def _read(path: Path) -> RunConfig:
    try:
        return from_json(path)
    except (OSError, ValueError, BadInput) as error:
        raise BadInput(
            f"{path} cannot be read ({error}); restore it, or choose another name="
        ) from None


# The run directory --------------------------------------------------------------------------------


def write_configuration(directory: RunDirectory, config: RunConfig, start: RunStart) -> None:
    """Configuration and code into the run directory. The caller holds its lock.

    Raises:
        BadInput: the folder cannot be written.
    """
    try:
        if start.is_new or start.opens_lineage:
            copy_code(_code_of(directory, start.lineage), config)
        replace_file(directory.config_json, to_json(config).encode(), durable=True)
        replace_file(directory.config, to_yaml(config).encode(), durable=True)
    except OSError as error:
        raise unwritable(directory, error) from None


def _code_of(directory: RunDirectory, lineage: int) -> Path:
    return directory.path / "code" / str(lineage)
