"""A rule about steps that ranks train again in place: whether they give the same numbers is on
record, and a device that has computed otherwise once is a finding about its node."""

from collections.abc import Sequence

from opt_logbook.record.stability_events import ReplayCompared

from opt_train.diagnosis.causes import Cause, CorruptionDetail
from opt_train.protocol.facts import LogLine, NodeFinding
from opt_train.stability.replayed import ReplayResult, ReplayVerdict
from opt_train.supervisor.rules.context import Context, Decision, Record
from opt_train.supervisor.rules.findings import finding_noted, is_known

CONFIDENCE = 0.7
"""That it was the device, and not a kernel that is deterministic most of the time."""


def report(s: Context) -> list[Decision]:
    """The steps that were trained again have been compared with the first time."""
    result, order = s.view.training.replayed.result, s.attempt.rollback
    if result is None or order <= s.state.replayed:
        return []
    node = node_of(s, (result.rank,))
    what = _in_words(s, result, node)
    compared = ReplayCompared(
        order, result.verdict, what, result.same, result.step, result.ranks, result.rank, node
    )
    blamed: list[Decision] = []
    if result.verdict is ReplayVerdict.ONE_TIME and node:
        # First: a supervisor that dies in between finds it known, and not the comparison.
        blamed = blame(s, node, CorruptionDetail.NOT_REPRODUCED, what)
    return [*blamed, Record(compared, step=s.step)]


def blame(s: Context, node: str, detail: CorruptionDetail, what: str) -> list[Decision]:
    """A device of `node` computes wrong without a word: on record once, with what is done."""
    finding = NodeFinding(
        Cause.SILENT_CORRUPTION,
        detail,
        # Whoever was wrong once is not to be believed before it is tested.
        permanent=True,
        confidence=CONFIDENCE,
        evidence=(LogLine(f"metrics/{s.attempt.name}.jsonl", 0, what),),
    )
    noted = finding_noted(s, node, finding)
    return [] if is_known(s.state, noted) else [Record(noted, step=s.step)]


def node_of(s: Context, ranks: Sequence[int]) -> str:
    """The node that all of `ranks` are on; empty: there is none."""
    known = range(s.attempt.world_size)
    nodes = {s.attempt.place_of(rank)[0] if rank in known else "" for rank in ranks}
    return nodes.pop() if len(nodes) == 1 else ""


def _in_words(s: Context, result: ReplayResult, node: str) -> str:
    times = f"{result.same:,} steps from step {s.attempt.start_step:,} on"
    match result.verdict:
        case ReplayVerdict.REPRODUCED:
            return (
                f"{times} gave the same numbers again, to the bit: what was seen lies in the state "
                "or the data, and in no device"
            )
        case ReplayVerdict.NOT_DETERMINISTIC:
            return (
                f"step {result.step:,} gave other numbers than the first time, with {result.same} "
                "that were the same before it: they are not the same twice here, and whether a "
                "device was wrong cannot be told"
            )
    whose = f"of rank {result.rank} on {node}" if node else f"of {result.ranks} ranks at once"
    blamed = "" if node else ", so whose device it was is not known"
    return (
        f"step {result.step:,} gave other numbers than the first time, after {times} that were the "
        f"same to the bit: a one-time result {whose}{blamed}"
    )
