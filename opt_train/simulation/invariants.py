"""What must hold whatever happens. A breach is an AssertionError whose text names it.

A fenced generation may live on where nothing reaches it, until its agents' lease runs out: it is
never mixed with its successor, its saves are never committed and its metrics never filed. That is
what "no two generations at once" means among machines that cannot be reached.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from opt_logbook.record.codec import GENESIS, digest, split
from opt_logbook.record.events import (
    AttemptEnded,
    AttemptStarted,
    CheckpointCommitted,
    CheckpointRejected,
    CheckpointRetired,
    Entry,
    FindingNoted,
    HoldBegan,
    HoldEnded,
    NodeFailed,
    NodeJoined,
    NodePromoted,
    RunHalted,
    SaveAbandoned,
)
from opt_logbook.record.node_events import NodeReturned
from opt_logbook.record.stability_events import DataProbed

from opt_train.protocol.commands import Begin
from opt_train.protocol.exits import DONE, PERSON_MUST_DECIDE
from opt_train.protocol.facts import (
    NodeFinding,
    Probed,
    RankExited,
    RankFact,
    ShardsSaved,
    SnapshotStored,
)
from opt_train.protocol.framing import Message
from opt_train.protocol.orders import RollBack
from opt_train.run.checkpoint import MEMORY, path_of_save
from opt_train.run.state import TERMINAL, Stage
from opt_train.simulation import machines
from opt_train.supervisor.effects import Finish
from opt_train.supervisor.rules.context import FENCE_AGAIN_SECONDS

if TYPE_CHECKING:
    from opt_train.simulation.world import World


@dataclass
class Known:
    """What has happened so far, in the world's own words and not the supervisor's."""

    reported: set[tuple[int, str]] = field(default_factory=set)
    """(generation, path) of saves that were reported to this supervisor."""
    committed: set[str] = field(default_factory=set)
    settled: set[str] = field(default_factory=set)
    """Saves that were committed or abandoned."""
    ended: set[int] = field(default_factory=set)
    """Generations whose end is journalled."""
    failed_nodes: set[str] = field(default_factory=set)
    """Those that are out now."""
    ever_failed: list[str] = field(default_factory=list)
    """Every time that one was taken out."""
    rejected: set[str] = field(default_factory=set)
    retired: set[str] = field(default_factory=set)
    held: bool = False
    stepping: dict[int, float] = field(default_factory=dict)
    """Generation -> when it last did a step."""


# The journal --------------------------------------------------------------------------------------


def check_append(world: "World", entry: Entry) -> None:
    """What a line says is so when it becomes durable."""
    known = world.known
    match entry.event:
        case CheckpointCommitted(path):
            # One that was given up may still land: then it is a checkpoint all the same.
            assert path not in known.committed, f"{path} is committed twice"
            known.committed.add(path)
            assert path in world.storage.disk, f"{path} is journalled as committed and not there"
            known.settled.add(path)
        case SaveAbandoned(path):
            known.settled.add(path)
        case CheckpointRejected(path):
            known.rejected.add(path)
        case CheckpointRetired(path):
            known.retired.add(path)
        case RunHalted():
            # Whoever starts the run again may have mended the storage: all are looked at anew.
            known.rejected.clear()
        case AttemptEnded(generation):
            _check_attempt_ended(world, generation)
        case NodeFailed(node):
            known.failed_nodes.add(node)
            known.ever_failed.append(node)
            world.preflights.passed.discard(node)
        case NodeReturned(node):
            assert node in world.preflights.passed, f"{node} is handed back without a preflight"
            assert known.ever_failed.count(node) == 1, f"{node} is handed back again and again"
            known.failed_nodes.remove(node)
        case NodeJoined(node) | NodePromoted(node):
            assert node not in known.failed_nodes, f"{node} has failed: {entry.event}"
        case HoldBegan() | HoldEnded() as changed:
            known.held = isinstance(changed, HoldBegan)
        case AttemptStarted() as started:
            assert not known.held, f"{entry.attempt} begins while a person holds the run"
            back = known.failed_nodes & {*started.nodes, *started.buffer}
            assert not back, f"{back} have failed and are handed back"
            _check_start_of(world, entry, started)


def _check_attempt_ended(world: "World", generation: int) -> None:
    known = world.known
    known.ended.add(generation)
    unsettled = {path for g, path in known.reported if g == generation} - known.settled
    assert not unsettled, f"nothing was said of {unsettled} before generation {generation} ended"
    left = [pair for pair in world.living(generation) if not _is_out_of_reach(world, pair[0])]
    assert not left, f"generation {generation} ends while ranks of it live: {left}"


def _is_out_of_reach(world: "World", node: str) -> bool:
    """Whether nothing can end the ranks of the node now."""
    # Nothing can reach a node that is cut off, nor end the ranks of an agent that is stopped before
    # a scheduler that was away is asked again to fence it. They are alone by then, and what they
    # write is fenced by their generation.
    asked_again = world.scheduler.away_until + FENCE_AGAIN_SECONDS
    stopped = world.agents[node].frozen and world.now < asked_again
    return stopped or machines.is_cut_off(world, node)


def _check_rollback(world: "World", entry: Entry) -> None:
    """What was to be gone back behind is not gone on from, where there is something before it."""
    for ordered in (record.order for record in world.replayed.outstanding_orders):
        if isinstance(ordered, RollBack):
            before = [c.step for c in world.replayed.chain() if not c.rejected]
            there = any(step <= ordered.step for step in before)
            step = entry.step or 0
            assert step <= ordered.step or not there, (
                f"{entry.attempt} begins at step {step}, and step {ordered.step} was ordered"
            )


def _check_start_of(world: "World", entry: Entry, started: AttemptStarted) -> None:
    """An attempt goes on from where the run was: neither from the future nor from a branch that was
    left."""
    path, step = started.checkpoint, entry.step or 0
    _check_rollback(world, entry)
    if not path:
        assert step == 0, f"{entry.attempt} begins at step {step} from nothing"
        return
    assert path not in world.known.rejected, f"{path} was rejected, and is restored"
    assert path not in world.known.retired, f"{path} was retired, and is restored"
    trail = world.storage.trails[path]
    assert trail is None or trail.step == step, f"{path} is not of step {step}"
    newest = world.newest_trail
    assert newest is None or newest.passed(trail), (
        f"{path} is of the future, or of a branch that was left: the run never passed it"
    )


def check_journal(world: "World") -> None:
    """No line is lost, reordered or changed: numbers, times and the chain of hashes hold from the
    first to the last."""
    previous, before = GENESIS, 0.0
    for number, line in enumerate(world.storage.lines, start=1):
        entry, parts = world.journal[number - 1], split(line.rstrip(b"\n"))
        assert entry.seq == number, f"line {number} says that it is {entry.seq}"
        assert parts is not None, f"line {number} is torn"
        assert parts[1] == digest(previous, parts[0]), f"line {number} does not verify"
        assert entry.time >= before, f"line {number} is older than the one before"
        previous, before = parts[1], entry.time


def check_metrics(world: "World", attempt: str) -> None:
    """Metrics of an older generation are fenced off."""
    live = world.replayed.live
    assert live is not None, f"metrics of {attempt} are filed, and nothing trains"
    assert live.name == attempt, f"metrics of {attempt} are filed, and {live.name} trains"


def check_retire(world: "World", path: str) -> None:
    """The newest two good checkpoints of the live chain stay."""
    chain = [c for c in world.replayed.chain() if not c.rejected]
    newest = [c.path for c in chain if not c.is_with_agents][-2:]
    assert path not in newest, f"{path} is one of the newest two good ones, and is removed"


def check_clear(world: "World", kept: frozenset[str]) -> None:
    """What is on record stays, and nobody may still be saving."""
    assert kept >= {c.path for c in world.replayed.checkpoints}, "what is on record is removed"
    saving = [r.begin.node for r in world.ranks() if not _is_out_of_reach(world, r.begin.node)]
    assert not saving, f"somebody on {saving} may still be saving"


def _never_was(world: "World", generation: int) -> bool:
    """A rollback that nobody came to hear of makes ranks of a generation that never was that of an
    attempt."""
    return all(started.generation != generation for started in world.events(AttemptStarted))


def check_acknowledged(world: "World", node: str, fact: Message) -> None:
    """An agent may forget what is durable, and nothing else."""
    generation = getattr(fact, "generation", 0)
    old = generation in world.known.ended or _never_was(world, generation)
    match fact:
        case RankExited():
            assert old, f"the end of a rank of generation {generation} is forgotten too early"
        case RankFact(fact=ShardsSaved()):
            path = path_of(fact)
            assert old or path in world.known.settled, f"{path} is forgotten before it is settled"
        case SnapshotStored():
            path = path_of_save(fact.attempt, fact.step, MEMORY)
            assert old or path in world.known.settled, f"{path} is forgotten before it is settled"
        case RankFact(fact=Probed(order)):
            on_record = [probed.order for probed in world.events(DataProbed)]
            assert old or order in on_record, f"probe {order} is forgotten before it is journalled"
        case NodeFinding():
            noted = [(e.node, e.cause, e.detail) for e in world.events(FindingNoted)]
            assert (node, fact.cause, fact.detail) in noted, (
                f"{fact} of {node} is forgotten before it is journalled"
            )


def path_of(fact: RankFact) -> str:
    """The checkpoint that a rank's fact about a save speaks of."""
    return path_of_save(fact.attempt, getattr(fact.fact, "step", -1))


# Nodes and generations ----------------------------------------------------------------------------


def check_start(world: "World", node: str) -> None:
    """No agent is started on a node that has failed, but to test it."""
    tested = world.config.burn_in.return_seconds > 0
    assert tested or node not in world.known.failed_nodes, (
        f"an agent is started on {node}, which has failed"
    )


def check_begin(world: "World", begin: Begin) -> None:
    """A rank begins on a node that is fit, of the generation that is journalled, and alone."""
    node, generation = begin.node, begin.generation
    assert node not in world.known.failed_nodes, f"{node} has failed and is handed back"
    live = world.replayed.live
    assert live is not None, "what begins is journalled"
    assert live.generation == generation, f"{generation} begins while {live.generation} lives"
    others = {
        r.begin.generation
        for r in world.ranks()
        if r.begin.generation != generation and not _is_out_of_reach(world, r.begin.node)
    }
    assert not others, f"generation {generation} begins while ranks of {others} live"


def check_generations(world: "World") -> None:
    """Where the supervisor can reach, one generation trains at a time."""
    newest = max(world.known.stepping, default=0)
    for generation, at in world.known.stepping.items():
        if generation == newest or at < world.now:
            continue
        reached = [n for n, _ in world.living(generation) if not machines.is_cut_off(world, n)]
        assert not reached, f"generations {generation} and {newest} train at once, on {reached}"


# The end ------------------------------------------------------------------------------------------


def check_finish(world: "World", finish: Finish) -> None:
    """A run ends in a stage that rests, and with a question if a person must decide."""
    state = world.replayed
    assert state.stage in TERMINAL, f"it is done in stage {state.stage}"
    if finish.code == PERSON_MUST_DECIDE:
        assert state.question, "a person must decide, and is not told what"
    if world.is_calm and state.stage is Stage.STOPPED and world.newest_trail is not None:
        assert state.saved_step == world.newest_trail.step, "a stop without trouble loses steps"
    if finish.code == DONE:
        assert state.stage is Stage.FINISHED
        assert state.furthest_save == world.config.train.steps, (
            "the last weights are in no checkpoint"
        )


def check_end(world: "World") -> None:
    """What must hold when all is over."""
    check_journal(world)
    state, kinds = world.replayed, world.kinds()
    assert not state.open_incidents, "an incident stays open"
    assert state.live is None, "an attempt is left open"
    opened = kinds.count("failure_seen")
    assert kinds.count("incident_closed") == opened, "each incident is closed once"
    budget = world.config.supervisor.restarts_without_progress
    progress = kinds.count("checkpoint_committed") + kinds.count("supervisor_started") + 1
    assert kinds.count("attempt_started") <= progress * (3 * budget + 1), "a restart loop"
    assert kinds.count("run_created") == 1
    remembered = state.offences if world.config.cluster.names_machines else ()
    assert world.shared_offences == remembered, "other runs are not told of a bad node"


def check_no_orphan(world: "World") -> None:
    """Nobody leads any more, and the leases are over: nothing of the run lives."""
    # An agent that is stopped by a signal has no clock, so only a fence ends it.
    left = [agent.node for agent in world.agents.values() if not agent.frozen or agent.released]
    assert not left, f"agents live on {left}, and nobody leads them"
