"""A drill: a node of a run is killed on purpose, on a day when somebody watches, and what the
supervisor does about it is read from the journal."""

from collections.abc import Iterable
from dataclasses import dataclass

from opt_logbook.record.events import (
    AttemptStarted,
    Entry,
    FailureSeen,
    IncidentDiagnosed,
    NodePromoted,
    Note,
    RunHalted,
    TrainingBegan,
)

from opt_train.protocol.exits import BadInput
from opt_train.run.state import RunState, Stage


@dataclass(frozen=True, slots=True)
class DrillOutcome:
    """What became of a run after its node was killed; None, or empty: not yet."""

    node: str
    detected_seconds: float | None = None
    """From the kill to the first sign in the journal."""
    seen: str = ""
    cause: str = ""
    buffer_node: str = ""
    """That took the node's place."""
    nodes: int | None = None
    """How many trained on; where no buffer node was left, fewer than before."""
    attempt: str = ""
    restarted_from: int | None = None
    steps_lost: int | None = None
    training_seconds: float | None = None
    """From the kill to the end of the first new step."""
    question: str = ""
    """For a person: the run stopped instead."""

    @property
    def training_went_on(self) -> bool:
        return self.training_seconds is not None


def choose_victim(state: RunState, wanted: str, nodes_at_least: int) -> str:
    """The node to kill: `wanted`, or the last that trains.

    Args:
        nodes_at_least: with fewer the run does not go on.

    Raises:
        BadInput: it does not train, or the run could not go on without it.
    """
    live = state.live
    if state.stage is not Stage.TRAINING or live is None:
        raise BadInput(
            f"the run is {state.stage}, and a drill needs one that trains; wait until "
            "`opt-train status` says so"
        )
    if wanted and wanted not in live.nodes:
        raise BadInput(f"--node {wanted} does not train; use one of {', '.join(live.nodes)}")
    if not buffers_of(state) and len(live.nodes) <= nodes_at_least:
        raise BadInput(
            "no buffer node could take the place of a node that is killed, and the run would not "
            "go on with fewer nodes; start it with cluster.buffer_nodes=1"
        )
    # Not the first, which has rank 0 and its store: who wants the hardest case names it.
    return wanted or live.nodes[-1]


def buffers_of(state: RunState) -> list[str]:
    """Nodes that stand by."""
    training = state.live.nodes if state.live is not None else ()
    standing_by = (name for name, node in state.nodes.items() if node.role == "buffer")
    return sorted(name for name in standing_by if name not in training)


def note_of(entries: Iterable[Entry], text: str) -> Entry | None:
    """The line of a person's note with these words; None: it is not journalled yet."""
    return next(
        (entry for entry in entries if isinstance(entry.event, Note) and entry.event.text == text),
        None,
    )


def outcome_of(node: str, killed: float, entries: Iterable[Entry]) -> DrillOutcome:
    """What `entries`, those since the kill, say of it.

    Args:
        killed: when, Unix seconds by the clock of the journal's writer.
    """
    out: dict[str, object] = {}
    failed_at = 0
    for entry in entries:
        match entry.event:
            case FailureSeen(what=what) if "seen" not in out:
                out |= {"detected_seconds": round(entry.time - killed, 3), "seen": what}
                # The first sign; a second incident on the way back is part of the same drill.
                failed_at = entry.step or 0
            case IncidentDiagnosed(cause=cause):
                out["cause"] = cause
            case NodePromoted(node=promoted, replaces=replaced) if replaced == node:
                out["buffer_node"] = promoted
            case AttemptStarted(nodes=nodes):
                begins = entry.step or 0
                out |= {"attempt": entry.attempt, "restarted_from": begins, "nodes": len(nodes)}
                out["steps_lost"] = max(0, failed_at - begins)
            case TrainingBegan() if "attempt" in out:
                out["training_seconds"] = round(entry.time - killed, 3)
                break
            case RunHalted(question=question):
                out["question"] = question
            case _:
                pass
    return DrillOutcome(node, **out)  # type: ignore[arg-type]  # each is written once, above
