"""A probe's finding, from the fact to what becomes of the node: nothing need fail for a sick node
to leave, and where the robot is on a leash nothing happens but the journal's line."""

import pytest
from opt_logbook.record.events import (
    AttemptEnded,
    AttemptStarted,
    CheckpointCommitted,
    FailureSeen,
    FindingNoted,
    IncidentDiagnosed,
    NodeFailed,
    NodePromoted,
    RunFinished,
    RunHalted,
)
from opt_logbook.record.node_events import ReplacementBegan

from opt_train.protocol.exits import DONE, PERSON_MUST_DECIDE
from opt_train.protocol.facts import NodeFinding
from opt_train.run.state import Stage
from opt_train.simulation.world import World
from opt_train.supervisor.modes import Mode
from opt_train.supervisor.rules import responses
from opt_train.supervisor.rules.node_fitness import is_unfit
from opt_train.supervisor.rules.responses import RESPONSES, Action
from tests.supervisor.started import a_run, code_of


def test_an_uncontained_error_replaces_the_node_now() -> None:
    world = a_run(steps=30).until_step(4)
    world.publish_finding("n1", "gpu_ecc", "uncontained")
    world.run()
    (seen,) = world.events(FailureSeen)
    assert (seen.node, seen.rank, seen.sign) == ("n1", -1, "finding")
    assert "a probe of n1 found gpu_ecc (uncontained)" in seen.what
    (diagnosed,) = world.events(IncidentDiagnosed)
    assert (diagnosed.cause, diagnosed.blame, diagnosed.node) == ("gpu_ecc", "hardware", "n1")
    assert diagnosed.evidence[0].text == "NVRM: Xid: uncontained"
    assert world.events(NodeFailed) == [NodeFailed("n1", 1, "gpu_ecc")]
    assert world.events(NodePromoted) == [NodePromoted("n2", "n1", 1)]
    assert [entry.step for entry in world.entries(AttemptStarted)] == [0, 3]
    assert code_of(world) == DONE


def test_a_pending_remap_replaces_the_node_at_the_next_checkpoint_and_nothing_fails() -> None:
    world = a_run(steps=30).until_step(4)
    world.publish_finding("n1", "gpu_ecc", "remap_pending")
    world.until_step(5)
    assert world.replayed.stage is Stage.TRAINING, "it trains on"
    assert is_unfit(world.replayed, "n1")
    assert world.events(NodeFailed) == []
    world.run()
    (began,) = world.entries(ReplacementBegan)
    assert began.event == ReplacementBegan(1, "n1", "gpu_ecc", "remap_pending")
    saved = next(entry for entry in world.entries(CheckpointCommitted) if entry.step == 6)
    assert saved.seq < began.seq
    first, second = world.entries(AttemptStarted)
    assert (second.step, second.event.nodes) == (6, ("n0", "n2"))
    assert "nothing had failed" in second.event.reason
    assert [e.outcome for e in world.events(AttemptEnded)] == ["replaced", "finished"]
    assert world.events(NodeFailed) == [NodeFailed("n1", 0, "gpu_ecc")]
    assert world.events(NodePromoted) == [NodePromoted("n2", "n1", 0)]
    assert world.events(FailureSeen) == []
    assert world.living(first.event.generation) == []
    assert code_of(world) == DONE


def test_a_node_that_an_admin_drains_is_replaced_at_the_next_checkpoint() -> None:
    world = a_run(steps=30).until_step(4)
    world.scheduler.draining["n1"] = "new DIMM"
    world.run()
    (noted,) = world.events(FindingNoted)
    assert (noted.node, noted.cause, noted.detail, noted.blame) == (
        *("n1", "preemption", "drain"),
        "scheduler",
    )
    assert noted.evidence[0].text == "drained: new DIMM"
    assert world.events(NodePromoted) == [NodePromoted("n2", "n1", 0)]
    assert world.events(FailureSeen) == []
    assert code_of(world) == DONE


def test_a_buffer_node_that_an_admin_drains_takes_nobodys_place() -> None:
    world = a_run(steps=30).until_step(4)
    world.scheduler.draining["n2"] = "new DIMM"
    world.until_step(8)
    assert world.events(NodeFailed) == [NodeFailed("n2", 0, "preemption")]
    world.run()
    assert code_of(world) == DONE


def test_without_a_buffer_node_a_pending_remap_trains_on() -> None:
    """A run that stands still until a person comes is worse than a row that waits for a reset."""
    world = a_run(steps=20, buffer_nodes=0).until_step(4)
    world.publish_finding("n1", "gpu_ecc", "remap_pending")
    world.until_step(8)
    world.kill_rank(0)
    world.run()
    assert [s.nodes for s in world.events(AttemptStarted)] == [("n0", "n1")] * 2
    assert world.events(NodeFailed) == world.events(ReplacementBegan) == []
    assert code_of(world) == DONE


def test_after_a_failure_a_node_with_a_pending_remap_is_left_out_at_once() -> None:
    """Nothing trains: no checkpoint is to be waited for."""
    world = a_run(steps=30).until_step(4)
    world.publish_finding("n1", "gpu_ecc", "remap_pending")
    world.second()
    world.kill_rank(0)
    world.run()
    assert world.events(ReplacementBegan) == []
    assert world.events(AttemptStarted)[1].nodes == ("n0", "n2")
    assert code_of(world) == DONE


def test_two_unfit_nodes_and_one_buffer_node_cost_one_replacement() -> None:
    world = a_run(steps=30).until_step(4)
    world.publish_finding("n0", "gpu_ecc", "remap_pending")
    world.publish_finding("n1", "gpu_ecc", "remap_pending")
    world.run()
    assert len(world.events(NodeFailed)) == len(world.events(ReplacementBegan)) == 1
    assert world.events(RunHalted) == []
    assert code_of(world) == DONE


def test_a_contained_error_costs_a_restart_in_place() -> None:
    world = a_run(steps=30).until_step(4)
    world.publish_finding("n1", "gpu_ecc", "contained", permanent=False)
    world.run()
    assert [d.cause for d in world.events(IncidentDiagnosed)] == ["gpu_ecc"]
    assert [s.nodes for s in world.events(AttemptStarted)] == [("n0", "n1")] * 2
    assert world.events(NodeFailed) == []
    assert code_of(world) == DONE


@pytest.mark.parametrize("detail", ["uncontained", "remap_pending"])
def test_a_buffer_node_with_a_finding_is_never_promoted(detail: str) -> None:
    world = a_run(steps=30).until_step(4)
    world.publish_finding("n2", "gpu_ecc", detail)
    world.until_step(6)
    assert world.events(NodeFailed) == [NodeFailed("n2", 0, "gpu_ecc")]
    assert world.events(FailureSeen) == [], "nothing trained on it"
    world.lose_node("n1")
    world.run()
    assert world.events(NodePromoted) == []
    assert code_of(world) == PERSON_MUST_DECIDE


@pytest.mark.parametrize("detail", ["uncontained", "remap_pending"])
def test_a_node_that_is_found_unfit_before_the_start_does_not_begin(detail: str) -> None:
    world = a_run()
    world.second()
    world.publish_finding("n0", "gpu_ecc", detail)
    world.run()
    assert world.events(AttemptStarted)[0].nodes == ("n2", "n1")
    assert world.events(FailureSeen) == []
    assert code_of(world) == DONE


@pytest.mark.parametrize("mode", [Mode.OBSERVE, Mode.ADVISE])
@pytest.mark.parametrize("detail", ["uncontained", "contained", "remap_pending"])
@pytest.mark.parametrize("node", ["n1", "n2"])
def test_where_the_robot_may_not_act_nothing_happens_but_the_journal_s_line(
    mode: Mode, detail: str, node: str
) -> None:
    """Invariant 14."""
    world = a_run(steps=20, modes=f"gpu_ecc={mode}").until_step(4)
    world.publish_finding(node, "gpu_ecc", detail)
    world.run()
    (noted,) = world.events(FindingNoted)
    assert (noted.node, noted.mode, noted.action) == (
        node,
        mode,
        RESPONSES["gpu_ecc", detail].action,  # type: ignore[index]  # a StrEnum's value
    )
    assert noted.response.startswith(f"nothing is done in mode {mode}; it would be: ")
    assert world.events(FailureSeen) == world.events(NodeFailed) == []
    assert len(world.events(AttemptStarted)) == 1
    assert code_of(world) == DONE


def test_a_drained_node_trains_on_and_is_left_out_of_the_next_attempt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = responses.Cause.STRAGGLER, ""
    drained = {**RESPONSES, row: responses.Response(Action.DRAIN)}
    monkeypatch.setattr(responses, "RESPONSES", drained)
    world = a_run(steps=30).until_step(4)
    world.publish_finding("n1", "straggler", "")
    world.until_step(10)
    assert len(world.events(AttemptStarted)) == 1
    world.kill_rank(0)
    world.run()
    assert world.events(AttemptStarted)[1].nodes == ("n0", "n2")
    assert code_of(world) == DONE


def test_a_finding_whose_response_is_a_halt_asks_a_person() -> None:
    world = a_run(steps=30).until_step(4)
    world.publish_finding("n1", "data", "the shards on n1 are those of another corpus")
    world.run()
    assert "another corpus" in world.events(RunHalted)[0].question
    assert code_of(world) == PERSON_MUST_DECIDE


def test_a_probe_that_cannot_be_read_changes_nothing() -> None:
    """Invariant 11."""
    world = a_run().until_step(4)
    world.publish_finding("n1", "unknown", "the driver does not answer")
    world.run()
    (noted,) = world.events(FindingNoted)
    assert noted.action == Action.NOTE
    assert len(world.events(AttemptStarted)) == 1
    assert code_of(world) == DONE


def test_a_condition_that_a_probe_publishes_again_and_again_is_one_line() -> None:
    world = a_run(buffer_nodes=0, steps=20).until_step(3)
    for _ in range(10):
        world.publish_finding("n1", "gpu_ecc", "remap_pending")
        world.second()
    assert len(world.events(FindingNoted)) == 1
    kept = world.agents["n1"].kept.values()
    assert not [fact for fact in kept if isinstance(fact, NodeFinding)], "it is acknowledged"


def test_a_rank_that_ends_of_what_a_probe_found_is_one_incident() -> None:
    """The process is gone a moment before the probe says why."""
    world = a_run(steps=30).until_step(4)
    world.kill_rank(1)
    world.publish_finding("n1", "gpu_ecc", "uncontained")
    world.run()
    (diagnosed,) = world.events(IncidentDiagnosed)
    assert (diagnosed.cause, diagnosed.detail, diagnosed.node) == ("gpu_ecc", "uncontained", "n1")
    assert world.events(AttemptStarted)[1].nodes == ("n0", "n2")
    assert code_of(world) == DONE


def replaced_in_spite_of_a_death(detail: str, boundary: int) -> World:
    world = a_run(steps=30).until_step(5)
    world.lives = boundary
    world.publish_finding("n1", "gpu_ecc", detail)
    for _ in range(12):
        world.second()
    if world.core is None and world.finish is None:
        world.start_supervisor()
    world.lives = None
    return world.run()


@pytest.mark.parametrize("detail", ["uncontained", "remap_pending"])
@pytest.mark.parametrize("boundary", range(0, 50, 2))
def test_a_supervisor_s_death_at_any_effect_acquits_no_node(detail: str, boundary: int) -> None:
    """What makes a node unfit is folded from the journal, or the agent still has it to say."""
    world = replaced_in_spite_of_a_death(detail, boundary)
    assert world.events(AttemptStarted)[-1].nodes == ("n0", "n2")
    assert [failed.node for failed in world.events(NodeFailed)] == ["n1"]
    assert len(world.events(FindingNoted)) == 1
    assert len(world.events(RunFinished)) == 1


def test_a_stop_and_a_new_start_do_not_forget_a_finding() -> None:
    world = a_run(steps=40).until_step(4)
    world.publish_finding("n1", "gpu_ecc", "remap_pending")
    world.second()
    world.ask_stop()
    world.run()
    world.start_supervisor()
    world.run()
    assert world.events(AttemptStarted)[-1].nodes == ("n0", "n2")
    assert code_of(world) == DONE
