"""Rules that look for what does not happen: ranks that do not move, nodes that are silent, ranks
that are not there.

Theory of operation
===================

Cars stand in a queue before a closed crossing. All of them stand; only the first is the reason.
Ranks in a collective are such a queue: each of them waits for the one that has not come yet, and
from its own clock every one of them looks hung. So the question is never "who waits too long?" but
"who is behind?": name the one that the others wait for, never those that wait.

Four ranks, and rank 2 is stuck in its data loader:

==== ==== ======= ======================= ==========================================
rank step phase   seconds in it (limit)   what it is
==== ==== ======= ======================= ==========================================
0    812  step    31 (24)                 in the all-reduce, beyond its limit: waits
1    812  step    31 (24)                 in the all-reduce, beyond its limit: waits
2    812  data    32 (90)                 behind: an earlier phase of the same step
3    812  waiting 30 (24)                 beyond its limit: waits
==== ==== ======= ======================= ==========================================

Ranks are ordered by step, and within a step by how far a phase is (`BEHIND`). Rank 2 comes first.
Its own limit for `data` is 90 s, so for now nothing is wrong: data may take that long. At 91 s rank
2 is named, and its stacks will say why. Had one judged by those that exceed their limits, ranks 0,
1 and 3 would have been blamed a minute earlier, for nothing that they did.

Two things come before the order. A process that the kernel shows as stopped (`T`) is behind
whatever its phase says, for it cannot move. And a node that is out of reach may hide the one that
is behind: then nobody who can be seen is named; if all who can be seen exceed their limits, the
silent node is, because now two signs agree. Silence alone is unknown, not dead (invariant 11).

Limits are learned from the run itself, per phase (phase_timeouts.py).
"""

from opt_train.protocol.facts import SlotState
from opt_train.supervisor.rules.context import (
    LEASE_MARGIN,
    UNREACHABLE_SECONDS,
    Context,
    Decision,
)
from opt_train.supervisor.rules.failures import failure
from opt_train.supervisor.training_view import is_first

FRESH_HEARTBEATS = 3
FRESH_SECONDS_MIN = 5.0
"""What is older than this, and than so many heartbeats, shows nothing of now."""
MISSING_SECONDS = 5.0
"""An agent reports a rank's end at once; a rank that is not there for this long has ended
unseen."""
BEHIND = {"start": 0, "data": 1, "checkpoint": 1, "evaluation": 1, "step": 2, "waiting": 3}
"""Within a step, who is in an earlier phase is behind; those in later ones wait for it."""


def watch_hang(s: Context) -> list[Decision]:
    """A rank does not move, and it is the one the others wait for.

    Ranks behind a stopped peer exceed their limits too, in `waiting` or in a collective. So the one
    that counts is the one that is stopped or behind, by its own phase's limit: while that one
    moves, nobody hangs, and while a stopped one is within its limit, nobody else is named in its
    place.
    """
    if (
        not s.view.watching
        or s.view.age(s.view.training.moved_at) < s.config.supervisor.minimum_seconds
    ):
        return []
    attempt = s.attempt
    ended = s.generation.exits
    ranks = [(node, slot) for node, slot in s.running(attempt.generation) if slot.rank not in ended]
    fresh = [(node, rank) for node, rank in ranks if _is_fresh(s, node)]
    if not fresh:
        return []
    # SIGSTOP leaves phase and step as they were: only the state letter of the kernel shows it.
    stopped = [(n, r) for n, r in fresh if r.process_state == "T"]
    silent = [(n, r) for n, r in ranks if (n, r) not in fresh]
    if not stopped and silent:
        return _silent_peer(s, fresh, silent)
    node, rank = min(
        stopped or fresh,
        key=lambda item: (item[1].step, BEHIND.get(item[1].phase, 2), item[1].rank),
    )
    if not is_over(s, node, rank):
        return []
    state = "; its process is stopped" if rank.process_state == "T" else ""
    what = (
        f"rank {rank.rank} on {node} has not moved for {_seconds(s, node, rank):.0f} s in phase "
        f"{rank.phase} "
        f"of step {rank.step}{state}"
    )
    return failure(s, node, rank.rank, what, "hang")


def _silent_peer(
    s: Context, fresh: list[tuple[str, SlotState]], silent: list[tuple[str, SlotState]]
) -> list[Decision]:
    """All that can be seen wait beyond their limits, and a node is out of reach: two signs that
    agree."""
    if not all(is_over(s, n, r) for n, r in fresh):
        return []
    node, rank = silent[0]
    if not is_over(s, node, rank):
        return []
    silence = s.view.age(s.view.node(node).slots_at)
    return failure(
        s,
        node,
        -1,
        f"no word from {node} for {silence:.0f} s, and its peers wait for it",
        "silence",
    )


def _is_fresh(s: Context, node: str) -> bool:
    view = s.view.node(node)
    fresh = max(FRESH_SECONDS_MIN, FRESH_HEARTBEATS * s.config.cluster.heartbeat_seconds)
    return view.connected and s.view.age(view.slots_at) <= fresh


def is_over(s: Context, node: str, rank: SlotState) -> bool:
    return _seconds(s, node, rank) > s.view.training.timeouts.limit(
        rank.phase, is_first(rank.step, s.state)
    )


def _seconds(s: Context, node: str, rank: SlotState) -> float:
    """Seconds in the phase by now: the agent's clock, and the time since it spoke."""
    return rank.phase_seconds + s.view.age(s.view.node(node).slots_at)


def watch_silence(s: Context) -> list[Decision]:
    """A node is out of reach for longer than its agent's lease, and nothing moves."""
    if not s.view.watching:
        return []
    attempt = s.attempt
    patience = LEASE_MARGIN * s.config.supervisor.orphan_seconds + UNREACHABLE_SECONDS
    if attempt.leader != s.state.leader:
        # Right after a takeover every agent is silent, until it has found the new address.
        patience = max(patience, s.config.supervisor.join_seconds)
    if s.view.age(s.view.training.moved_at) <= patience:
        return []
    for node in attempt.nodes:
        view = s.view.node(node)
        silence = s.view.age(view.silent_since)
        if not view.connected and silence > patience:
            return failure(
                s,
                node,
                -1,
                f"no word from {node} for {silence:.0f} s, and training does not move",
                "silence",
            )
    return []


def watch_missing(s: Context) -> list[Decision]:
    """A rank should run where its agent shows none, and nobody reported its end."""
    if not s.view.watching:
        return []
    attempt = s.attempt
    generation = attempt.generation
    ended = s.generation.exits
    taking_over = attempt.leader != s.state.leader
    # Ranks are numbered node by node, so they are looked at in order; most nodes lack none.
    lacking = {node for node in attempt.nodes if s.view.node(node).absent_since}
    for rank in range(attempt.world_size if lacking else 0):
        node, slot = attempt.place_of(rank)
        if node not in lacking:
            continue
        view = s.view.node(node)
        absent = view.absent_since.get(slot)
        if rank in ended or not (view.connected and view.caught_up) or absent is None:
            continue
        seen_before = attempt.began or taking_over or s.generation.was_running(rank)
        # Ranks die with their agent: behind a new one there is nothing to wait for.
        replaced = view.lost_generation >= generation and seen_before
        since = absent if seen_before else s.view.stage_since
        # One that was never seen may still be importing torch: 1 to 3 s on an idle core, 7 to 10 s
        # on a busy one (measured), more from a cold shared file system.
        limit = MISSING_SECONDS if seen_before else s.config.supervisor.start_seconds
        if (
            not replaced
            and s.view.age(max(since, view.connected_at if seen_before else since)) < limit
        ):
            continue
        what = f"rank {rank} is not on {node}" + (", whose agent is a new one" if replaced else "")
        return failure(
            s, node, rank, what, "takeover" if taking_over and not attempt.began else "missing"
        )
    return []
