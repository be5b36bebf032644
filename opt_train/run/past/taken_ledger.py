"""The ledger that a new run takes from another: the same orders at the same steps, from the start.

A run's ledger is what its surviving line was trained under, and nothing else of what was ordered:
an entry holds from its step on in every attempt that came there, and one that was added later
begins where the line was then, behind all steps that are left of before (`run/ledger.py`). A
rollback stands in it as what it brought. So a run that begins with the whole of it, and is
configured alike, is that line without the steps that were given up: to the bit, where the sums are
the same, which the number of ranks and the layout decide too. What the guards of the loop left out
they leave out again.

It is taken once, as the run is created, into the first line of its journal: what is ordered in the
other run later changes nothing here.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from opt_logbook.record import journal
from opt_logbook.record.attempt import AttemptId
from opt_logbook.record.events import AttemptStarted, Entry
from opt_logbook.record.run_directory import RunDirectory

from opt_train.config.difference import difference
from opt_train.config.run_config import RunConfig, from_json
from opt_train.protocol.exits import BadInput
from opt_train.protocol.orders import UnknownOrder
from opt_train.run.code.frozen_code import code_difference
from opt_train.run.fold import fold
from opt_train.run.ledger import TakenLedger
from opt_train.run.lineage import code_of
from opt_train.run.state import RunState

ROUNDING = ("parallel.", "train.micro_batch", "train.device", "optim.fused")
"""Operational keys that decide in which order numbers are summed, and so the last bits."""


def take_ledger(directory: RunDirectory, config: RunConfig, request: str) -> TakenLedger | None:
    """What the new run `directory` takes from the one that `request` means: a run directory, or the
    name of one in the same `runs`. None: nothing is asked for, or it was taken when the run began.

    Raises:
        BadInput: there is no such run, its ledger cannot be known, or this one has begun without.
    """
    if not request:
        return None
    source = _source_of(config, request)
    # The same command resumes, so it names the ledger every time; what was taken then counts, not
    # what the other run's ledger has become since.
    begun = _begun_under(directory)
    if begun is not None:
        if begun == str(source.path):
            return None
        raise BadInput(
            f"{directory.path} has begun {f'under the ledger of {begun}' if begun else 'without'}, "
            f"and a run takes a ledger as it begins; leave ledger={request} out, or choose another "
            "name="
        )
    reading = journal.read(source.journal)
    # A supervisor may go on where a person says so; to repeat a run in part would be no repetition.
    if reading.damaged:
        lines = ", ".join(str(damage.line) for damage in reading.damaged)
        raise BadInput(
            f"{source.journal} is damaged (line {lines}), and an order may have stood there; "
            "restore it from a copy"
        )
    state = RunState()
    for entry in reading.entries:
        state = fold(state, entry)
    if state.created is None:
        raise BadInput(
            f"ledger={request}: {source.path} has not begun; name a run that has trained"
        )
    # Said here and not by a rank, a minute later, on each node.
    for known in state.ledger:
        if isinstance(known.order, UnknownOrder):
            raise BadInput(
                f"order {known.order.number} ({known.order.name}) in the ledger of {source.path} "
                "is of another version; use the opt-train that it was given with"
            )
    found = (*_keys_apart(source, state, config), *_ranks_apart(reading.entries, state, config))
    fingerprint = state.created.data_fingerprint
    return TakenLedger(str(source.path), state.ledger, found, fingerprint)


def _source_of(config: RunConfig, request: str) -> RunDirectory:
    # A path first: it is what `status` and the other verbs take.
    candidates = [RunDirectory(Path(request).absolute())]
    if "/" not in request:
        candidates.append(RunDirectory(Path(config.runs, request).absolute()))
    for candidate in candidates:
        if candidate.journal.exists():
            return candidate
    raise BadInput(
        f"ledger={request} is no run directory, and runs={config.runs} has none of that name; give "
        "one like runs/demo"
    )


def _begun_under(directory: RunDirectory) -> str | None:
    """The run whose ledger this one took as it began; empty: none; None: it has not begun."""
    for entry in journal.read(directory.journal).entries[:1]:
        return str(getattr(entry.event, "ledger_of", ""))
    return None


def line_of(state: RunState) -> tuple[str, ...]:
    """The attempts of the surviving line, the newest first."""
    line: list[str] = []
    name = state.attempt.name if state.attempt is not None else ""
    # No attempt twice: in a damaged journal parents may form a circle.
    while name and name not in line:
        line.append(name)
        name, _ = state.history.get(name, ("", 0))
    return tuple(line)


def _keys_apart(source: RunDirectory, state: RunState, config: RunConfig) -> Iterator[str]:
    lineages = sorted({AttemptId.parse(name).lineage for name in line_of(state)})
    for lineage in lineages or [max(1, state.lineage)]:
        kept = code_of(source, lineage)
        try:
            there = from_json(kept / "config.json")
        except (OSError, ValueError, BadInput) as error:
            raise BadInput(
                f"{kept / 'config.json'}, which {source.path} was trained with, cannot be read "
                f"({error}); restore it from a copy"
            ) from None
        # Each lineage that the line passed through: one configuration cannot be like several.
        apart = difference(there, config)
        which = f"lineage {lineage}, " if len(lineages) > 1 else ""
        rounding = [line for line in apart.operational if line.startswith(ROUNDING)]
        for line in (*apart.fixed, *apart.training, *rounding):
            if not (line.startswith("train.steps:") and _steps_are_apart(there, config)):
                yield f"{which}{line}"
        code = code_difference(kept)
        yield from (f"{which}{line}" for line in code.packages)
        # Not which: between two runs of a project that is worked on there are dozens.
        if code.sources:
            yield f"{which}code: other sources"


def _steps_are_apart(there: RunConfig, here: RunConfig) -> bool:
    """Whether how long the runs are meant to train decides no learning rate."""
    ends = {there.optim.decay_steps, here.optim.decay_steps}
    return here.optim.schedule == "constant" or (0 not in ends and len(ends) == 1)


def _ranks_apart(entries: Sequence[Entry], state: RunState, config: RunConfig) -> Iterator[str]:
    # Of the line alone: what was given up may have been trained on other nodes.
    line = line_of(state)
    counts = {
        entry.event.world_size
        for entry in entries
        if isinstance(entry.event, AttemptStarted) and entry.attempt in line
    }
    if counts - {config.world_size}:
        yield f"ranks: {' and '.join(map(str, sorted(counts)))} -> {config.world_size}"
