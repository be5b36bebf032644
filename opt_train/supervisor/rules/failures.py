"""Rules of failure: what counts as one, how ranks die together, and what follows from the
diagnosis."""

from opt_logbook.record.events import (
    AttemptEnded,
    CheckpointRejected,
    FailureSeen,
    GenerationKilled,
    NodeFailed,
)

from opt_train.diagnosis.verdict import Case, Diagnosis, diagnose
from opt_train.optim.in_force import differences, in_force
from opt_train.protocol.exits import DONE
from opt_train.run.checkpoint import Checkpoint
from opt_train.run.incident import Incident
from opt_train.run.state import Stage
from opt_train.supervisor.effects import FenceNode
from opt_train.supervisor.rules.attempts import report_dropped
from opt_train.supervisor.rules.checkpoints import abandon_unfinished, saves_in_flight
from opt_train.supervisor.rules.context import Context, Decision, Record
from opt_train.supervisor.rules.node_fitness import interrupting
from opt_train.supervisor.rules.nodes import halt
from opt_train.supervisor.rules.responses import Action, Remedy, respond

SURE = 0.8
"""A diagnosis of this confidence needs no evidence beyond the ends of all ranks."""


def failure(s: Context, node: str, rank: int, what: str, sign: str) -> list[Decision]:
    """The first confirmed sign of an incident. Killing follows from the stage."""
    seen = FailureSeen(s.state.incidents + 1, s.attempt.generation, node, rank, what, sign)
    return [Record(seen, step=s.step)]


# Signs --------------------------------------------------------------------------------------------


def detect_rank_exit(s: Context) -> list[Decision]:
    """A rank is gone that had not said it would go."""
    # The first that was reported names the incident. Which one is the root is for the diagnosis,
    # when all have ended and their logs are here.
    for rank, (node, exited) in s.generation.deaths.items():
        how = f"signal {exited.signal}" if exited.signal is not None else f"exit code {exited.code}"
        where = f" in phase {exited.phase}" if exited.phase else ""
        return failure(s, node, rank, f"rank {rank} on {node} ended with {how}{where}", "exit")
    return []


def detect_node_down(s: Context) -> list[Decision]:
    """The cluster says that a node is gone whose ranks had not all left."""
    attempt = s.attempt
    ended = s.generation.exits
    for place, node in enumerate(attempt.nodes if s.view.called_down else ()):
        if not s.view.is_down(node):
            continue
        slots = attempt.slots_per_node
        if all(rank in ended for rank in range(place * slots, (place + 1) * slots)):
            continue
        reason = s.view.node(node).cluster_reason
        return failure(s, node, -1, f"{node} is down{': ' + reason if reason else ''}", "down")
    return []


def detect_unsaved_end(s: Context) -> list[Decision]:
    """All ranks are done, and what they trained is in no checkpoint: finished it would be lost for
    good."""
    attempt = s.attempt
    exits = s.generation.exits
    if len(exits) < attempt.world_size or s.generation.deaths or saves_in_flight(s):
        return []
    last = max(exited.leaving.step for _, exited in exits.values() if exited.leaving is not None)
    done = all(exited.code == DONE for _, exited in exits.values())
    # What agents have goes with them when the run ends.
    if not done or any(saved.step == last for saved in s.state.chain() if not saved.is_with_agents):
        return []
    return failure(
        s, "", -1, f"all steps are done, but there is no checkpoint of step {last}", "unsaved"
    )


def detect_difference(s: Context) -> list[Decision]:
    """What a rank reports to be in force is not what the configuration says (invariant 3)."""
    attempt = s.attempt
    reported = s.generation.in_force
    if attempt.in_force or not reported:
        return []
    expected = in_force(s.config, s.state.ledger, attempt.start_step)
    for rank, values in s.generation.in_force_variants:
        wrong = differences(expected, values)
        if wrong:
            return failure(
                s,
                attempt.place_of(rank)[0],
                rank,
                f"rank {rank} is not in force what it should: {wrong[0]}",
                "in_force",
            )
    return []


def detect_other_lineage(s: Context) -> list[Decision]:
    """Ranks of an older configuration are not adopted."""
    if s.attempt.lineage == s.state.lineage:
        return []
    return failure(
        s, "", -1, "the configuration changed while ranks of the old one ran", "takeover"
    )


# Dying together -----------------------------------------------------------------------------------


def kill(s: Context) -> list[Decision]:
    # The whole generation, not what is left of one node: gloo notices a dead peer at once, but on
    # NCCL survivors spin in their collective for minutes.
    return s.end_of(s.attempt.generation, s.attempt.nodes)


def conclude_kill(s: Context) -> list[Decision]:
    """All ranks are gone from every node, and their last facts have had time to arrive."""
    attempt = s.attempt
    failing = s.state.stage is Stage.FAILING
    if attempt.killed or not all(s.is_gone(n, attempt.generation) for n in attempt.nodes):
        return []
    if failing and not _has_settled(s):
        return []
    killed = sum(exited.killed_by_agent for _, exited in s.generation.exits.values())
    number = s.state.incident.number if failing and s.state.incident else 0
    return [Record(GenerationKilled(attempt.generation, number, killed), step=s.step)]


def _has_settled(s: Context) -> bool:
    """Whether nothing that is still to come would change the diagnosis."""
    # The log of the root may arrive behind the complaints of its victims, and a probe may look
    # later still: a diagnosis made at once would blame the loudest.
    if s.view.age(s.view.stage_since) >= s.config.supervisor.settle_seconds:
        return True
    incident = s.state.incident
    # The end of every rank is here, with the end of its log, or its node is down and says no more.
    down = {node for node in s.attempt.nodes if s.view.is_down(node)}
    ended = all(
        rank in s.generation.exits or s.attempt.place_of(rank)[0] in down
        for rank in range(s.attempt.world_size)
    )
    return ended and incident is not None and diagnosis_of(s, incident).confidence >= SURE


def identify(s: Context) -> list[Decision]:
    """Name the cause, and say what will be done about it."""
    incident = s.state.incident
    if not s.attempt.killed or incident is None or incident.cause:
        return []
    found = diagnosis_of(s, incident)
    restarts = s.state.restarts_after(found.cause)
    remedy = respond(
        found.cause,
        found.detail,
        found.node,
        strikes=restarts.get(found.cause, 0),
        strikes_in_all=sum(restarts.values()),
        buffer_is_ready=bool(s.buffer_nodes()),
        config=s.config.supervisor,
    )
    return [Record(found.as_event(incident.number, remedy.sentence), step=incident.step)]


def diagnosis_of(s: Context, incident: Incident) -> Diagnosis:
    """The root cause by what is known of the generation now."""
    nodes = s.attempt.nodes
    fenced = tuple(n for n in nodes if s.view.node(n).fenced_unreached)
    down = {
        n: s.view.node(n).cluster_reason for n in nodes if s.view.is_down(n) and n not in fenced
    }
    seen = incident.seen
    if seen.sign == "down" and seen.node not in down:
        # It went down, and by now its agent may be back: what was seen was seen.
        down[seen.node] = seen.what
    case = Case(
        seen=seen,
        exits=s.generation.exits,
        exit_notices=s.generation.notices,
        stacks=s.generation.stacks,
        down=down,
        fenced=fenced,
        findings=tuple(f.event for n in nodes for f in interrupting(s.state, n)),
    )
    return diagnose(case)


def end_failed(s: Context) -> list[Decision]:
    """The cause is known: the attempt is over. A manifest that is being written is waited for, it
    may be the newest."""
    incident = s.state.incident
    if not s.attempt.killed or incident is None or not incident.cause or saves_in_flight(s):
        return []
    return [
        *abandon_unfinished(s, "its ranks were gone before it was complete"),
        *report_dropped(s),
        Record(AttemptEnded(s.attempt.generation, "failed"), step=max(s.step, incident.step)),
    ]


# What follows -------------------------------------------------------------------------------------


def remedy_for(s: Context, incident: Incident) -> Remedy:
    """What the table of responses says about a diagnosed incident."""
    return respond(
        incident.cause,
        incident.detail,
        incident.culprit,
        incident.strikes,
        incident.strikes_in_all,
        buffer_is_ready=bool(s.buffer_nodes()),
        config=s.config.supervisor,
    )


def follow(s: Context) -> list[Decision]:
    """Carry out the response to the newest incident, unless an attempt has been made since."""
    incident = s.state.incident
    if incident is None or incident.restored_step >= 0:
        return []
    suspect = _suspect(s, incident)
    if suspect is not None:
        why = f"a rank could not restore it: {incident.detail}"
        return [Record(CheckpointRejected(suspect.path, why), suspect.step, suspect.attempt)]
    remedy = remedy_for(s, incident)
    if remedy.action is Action.HALT:
        return halt(s, question_of(incident, remedy), incident.cause)
    culprit = incident.culprit
    if remedy.action is Action.REPLACE_NOW and culprit and not s.state.has_failed(culprit):
        # On record first: a supervisor that dies before the fence does not hand the node back
        # (invariant 8). The cloud of OPT-175B handed out the same bad node again and again.
        cause = s.cause_of_loss(culprit, incident.cause)
        return [Record(NodeFailed(culprit, incident.number, cause)), FenceNode(culprit)]
    return []


def _suspect(s: Context, incident: Incident) -> Checkpoint | None:
    """The checkpoint that the ranks have found bad, until it is rejected."""
    if not s.state.speaks_against_checkpoint(incident.cause):
        return None
    assert s.state.attempt is not None
    path = s.state.attempt.checkpoint
    return next((c for c in s.state.checkpoints if c.path == path and not c.rejected), None)


def question_of(incident: Incident, remedy: Remedy) -> str:
    """What a person must decide, with what was seen."""
    return f"{remedy.question} Seen: {incident.seen.what}."
