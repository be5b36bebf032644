"""Which samples a step was trained on: by configuration, ledger and journal alone.

The order of the data is a function of seed and position, and the position one of step and ledger.
So the batch of any step of any attempt is known as long as the run directory is there, and its text
as long as the prepared data is.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from opt_logbook.record import journal, metrics
from opt_logbook.record.attempt import AttemptId
from opt_logbook.record.events import Entry
from opt_logbook.record.run_directory import RunDirectory

from opt_train.config.run_config import RunConfig, from_json
from opt_train.data.manifest import DATASET_FILE, DatasetManifest
from opt_train.data.order import SampleOrder
from opt_train.optim.in_force import in_force
from opt_train.protocol.exits import BadInput
from opt_train.run.fold import fold
from opt_train.run.ledger import Ledger
from opt_train.run.lineage import code_of
from opt_train.run.past.taken_ledger import line_of
from opt_train.run.state import RunState


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The batch of one step."""

    attempt: str
    step: int
    """As a metrics line counts: 1 is the first."""
    is_trained: bool
    """The attempt's metrics have come that far; else it is the batch that it would train on."""
    position: int
    """Of its first sample in the order of the data."""
    samples: tuple[int, ...]
    """Their numbers in the training split."""
    config: RunConfig
    """That the attempt was trained with."""
    data: Path
    """The prepared data."""
    manifest: DatasetManifest


def batch_of(run: RunDirectory, step: int, attempt: str = "") -> StepBatch:
    """The batch that took `attempt` to `step`; without one, the newest that has trained the step
    and whose work on it was kept.

    Raises:
        BadInput: there is no such run, attempt or step, or what is needed of it is not there.
    """
    state, ledgers = _past(journal.read(run.journal).entries)
    if state.created is None:
        raise BadInput(f"{run.path} is no run directory, or has not begun; give one like runs/demo")
    name = _attempt_of(run, state, step, attempt)
    config = _config_of(run, AttemptId.parse(name).lineage)
    data, manifest = _data_of(run, state.created.data_fingerprint)
    try:
        position = int(in_force(config, ledgers.get(name, state.ledger), step - 1)["samples"])
    except ValueError as error:
        raise BadInput(f"{error}; use the opt-train that {run.path} was trained with") from None
    available = (manifest.train_tokens - 1) // config.data.sequence_length
    order = SampleOrder(available, config.seed)
    # The whole batch, in the order of positions: which rank has which of it does not matter here.
    samples = (order.index(position + k) for k in range(config.train.global_batch))
    newest = metrics.newest_lines(run, name, 1)
    return StepBatch(
        attempt=name,
        step=step,
        is_trained=bool(newest) and int(newest[-1]["step"]) >= step,
        position=position,
        samples=tuple(samples),
        config=config,
        data=data,
        manifest=manifest,
    )


def _past(entries: Iterable[Entry]) -> tuple[RunState, dict[str, Ledger]]:
    """The run, and the ledger that each attempt had at its end: what came later may begin at steps
    that it trained without."""
    state, ledgers = RunState(), dict[str, Ledger]()
    for entry in entries:
        state = fold(state, entry)
        # A rollback's own changes come with the attempt that it begins, never with the one it ends.
        if state.live is not None:
            ledgers[state.live.name] = state.ledger
    return state, ledgers


def _attempt_of(run: RunDirectory, state: RunState, step: int, attempt: str) -> str:
    if step < 1:
        raise BadInput(f"step {step} is none: the first step is 1")
    if attempt:
        if attempt not in state.history:
            known = ", ".join(state.history) or "none"
            raise BadInput(f"{run.path} has no attempt {attempt}; it has {known}")
        _, start = state.history[attempt]
        if step <= start:
            raise BadInput(f"attempt {attempt} began behind step {start}: its first is {start + 1}")
        return attempt
    for name in line_of(state):
        _, start = state.history[name]
        if step > start:
            return name
    raise BadInput(f"no attempt of {run.path} has trained step {step}")


def _config_of(run: RunDirectory, lineage: int) -> RunConfig:
    # The lineage's own copy: the newest configuration may be that of a later one.
    path = code_of(run, lineage) / "config.json"
    try:
        return from_json(path if path.exists() else run.config_json)
    except (OSError, ValueError, BadInput) as error:
        raise BadInput(
            f"{path}, which {run.path} was trained with, cannot be read ({error}); restore it from "
            "a copy"
        ) from None


def _data_of(run: RunDirectory, fingerprint: str) -> tuple[Path, DatasetManifest]:
    """The prepared data where the run read it last."""
    # The newest configuration: the folder may be moved between two starts, its tokens never change.
    try:
        folder = Path(from_json(run.config_json).data.directory)
    except (OSError, ValueError, BadInput) as error:
        raise BadInput(f"{run.config_json} cannot be read ({error}); restore it") from None
    if not (folder / DATASET_FILE).exists():
        raise BadInput(
            f"{folder}, the prepared data of {run.path}, is not there, so what its batches were "
            "cannot be read; put it back, or prepare the same corpus there again"
        )
    manifest = DatasetManifest.read(folder)
    if fingerprint not in ("", manifest.fingerprint):
        raise BadInput(
            f"{folder} holds other tokens now than {run.path} was trained on "
            f"({manifest.fingerprint[:12]} instead of {fingerprint[:12]}); prepare the same corpus "
            "there again"
        )
    return folder, manifest
