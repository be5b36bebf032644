"""Each path of a run's life, told to the core by a small world in virtual time."""

import pytest
from opt_logbook.record.events import (
    AgentsAdopted,
    AttemptStarted,
    CheckpointCommitted,
    CheckpointRejected,
    CheckpointRetired,
    FailureSeen,
    IncidentClosed,
    IncidentDiagnosed,
    LineageOpened,
    NodeFailed,
    NodeJoined,
    NodePromoted,
    RunFinished,
    RunHalted,
    SaveAbandoned,
    TrainingBegan,
)

from opt_train.optim.in_force import in_force
from opt_train.protocol.commands import Begin, Kill, Leave
from opt_train.protocol.exits import DONE, PERSON_MUST_DECIDE
from opt_train.simulation.actors import make_config
from opt_train.simulation.world import World
from opt_train.supervisor.effects import Append, FenceNode, Send, Show, WriteMetrics
from opt_train.supervisor.inputs import ManifestCommitted, MetricsReceived
from tests.supervisor.started import a_run, code_of


def test_an_undisturbed_run_finishes_and_says_so_once() -> None:
    world = a_run().run()
    assert code_of(world) == DONE
    assert [n.role for n in world.events(NodeJoined)] == ["active", "active", "buffer"]
    (started,) = world.events(AttemptStarted)
    assert (started.nodes, started.buffer, started.world_size) == (("n0", "n1"), ("n2",), 2)
    (finished,) = world.events(RunFinished)
    assert finished.loss == 8.0 * (8 + 5) ** -0.2, "of the last batch, with the weights before it"
    assert abs(finished.validation_perplexity - 7.389056) < 1e-5
    assert [e.step for e in world.entries(CheckpointCommitted)] == [3, 6, 9]
    assert sorted(step for _, step in world.storage.metrics) == list(range(1, 10))
    assert world.events(TrainingBegan)[0].seconds == 4.0


def test_a_finished_run_is_not_run_again() -> None:
    world = a_run().run()
    lines = len(world.journal)
    world.start_supervisor()
    assert code_of(world) == DONE
    assert len(world.journal) == lines


def test_ranks_begin_only_after_rank_0_has_told_its_store() -> None:
    """Another order would have ranks guess a port."""
    world = a_run(slots_per_node=2).run()
    begins = [
        e.command for e in world.effects if isinstance(e, Send) and isinstance(e.command, Begin)
    ]
    assert [(b.rank, b.node, b.slot, b.store_port) for b in begins] == [
        (0, "n0", 0, 0),
        (1, "n0", 1, 7001),
        (2, "n1", 0, 7001),
        (3, "n1", 1, 7001),
    ]
    assert begins[0].checkpoint is None


def test_a_killed_rank_costs_a_restart_in_place_from_the_newest_checkpoint() -> None:
    world = a_run().until_step(5)
    world.kill_rank(1)
    world.run()
    (diagnosed,) = world.events(IncidentDiagnosed)
    assert (diagnosed.cause, diagnosed.node, diagnosed.rank) == ("killed", "n1", 1)
    second = world.entries(AttemptStarted)[1]
    assert (second.attempt, second.step, second.event.nodes) == ("1.01", 3, ("n0", "n1"))
    assert (second.event.parent, second.event.checkpoint) == (
        "1.00",
        "checkpoints/1.00/step-00000003",
    )
    (closed,) = world.entries(IncidentClosed)
    assert (closed.event.outcome, closed.event.steps_lost, closed.step) == ("recovered", 2, 5)
    assert closed.event.seconds_lost > closed.event.down_seconds > 0
    assert code_of(world) == DONE


def test_ranks_die_together() -> None:
    """On NCCL survivors would spin for minutes: they are killed at the first death, after their
    stacks."""
    world = a_run().until_step(4)
    world.kill_rank(1)
    world.until(FailureSeen)
    kills = {
        e.node
        for e in world.effects
        if isinstance(e, Send) and e.command == Kill(generation=1, stacks=True)
    }
    assert kills == {"n0", "n1"}
    assert world.living(1) == []


def test_a_dead_node_is_replaced_in_its_place() -> None:
    world = a_run().until_step(4)
    world.lose_node("n0", "its agent process is gone")
    world.run()
    (diagnosed,) = world.events(IncidentDiagnosed)
    assert (diagnosed.cause, diagnosed.blame, diagnosed.node) == ("node_failure", "hardware", "n0")
    assert diagnosed.detail == "its agent process is gone", (
        "the fence's own reason does not cover the first one"
    )
    assert world.events(NodeFailed) == [NodeFailed("n0", 1, "node_failure")]
    assert world.events(NodePromoted) == [NodePromoted("n2", "n0", 1)]
    assert world.events(AttemptStarted)[1].nodes == ("n2", "n1")
    assert code_of(world) == DONE


def test_a_lost_node_is_named_though_its_peer_complained_first() -> None:
    """The survivor's broken connection comes before the cluster's word: it is the victim's cry, not
    the cause."""
    world = a_run().until_step(4)
    world.lose_node("n1", "its agent process is gone")
    world.kill_rank(
        0, code=1, text="RuntimeError: Read error [127.0.0.1]:51859: Connection reset by peer"
    )
    world.run()
    assert world.events(FailureSeen)[0].node == "n0"
    (diagnosed,) = world.events(IncidentDiagnosed)
    assert (diagnosed.cause, diagnosed.node) == ("node_failure", "n1")
    assert world.events(NodePromoted) == [NodePromoted("n2", "n1", 1)]
    assert code_of(world) == DONE


def test_without_a_buffer_node_a_person_is_asked_and_told_the_mend() -> None:
    world = a_run(buffer_nodes=0).until_step(4)
    world.lose_node("n1")
    world.run()
    (halted,) = world.events(RunHalted)
    assert "cluster.buffer_nodes=1" in halted.question
    assert halted.cause == "node_failure"
    assert world.events(IncidentClosed)[0].outcome == "halted"
    assert code_of(world) == PERSON_MUST_DECIDE


def test_a_halted_run_goes_on_with_more_nodes_and_not_with_the_failed_one() -> None:
    world = a_run(buffer_nodes=0).until_step(4)
    world.lose_node("n1")
    world.run()
    world.names = ("n0", "n1", "n2")
    world.start_supervisor()
    world.run()
    assert world.events(AttemptStarted)[-1].nodes == ("n0", "n2")
    assert code_of(world) == DONE


def test_a_bad_checkpoint_is_passed_over_for_the_one_before() -> None:
    world = a_run().until_step(7)
    world.storage.disk["checkpoints/1.00/step-00000006"] = "rank0.safetensors has another sha256"
    world.kill_rank(0)
    world.run()
    (rejected,) = world.entries(CheckpointRejected)
    assert (rejected.step, rejected.event.why) == (6, "rank0.safetensors has another sha256")
    assert world.entries(AttemptStarted)[1].step == 3
    assert code_of(world) == DONE


def test_never_silently_from_scratch() -> None:
    """With every checkpoint bad the run asks, it does not start at step 0."""
    world = a_run().until_step(7)
    world.storage.disk = dict.fromkeys(world.storage.disk, "truncated")
    world.kill_rank(0)
    world.run()
    assert len(world.events(AttemptStarted)) == 1
    assert "never starts from scratch" in world.events(RunHalted)[0].question


def test_unreadable_checkpoints_are_tried_again_once_a_person_has_mended_the_storage() -> None:
    """A file system that answered ESTALE while the run looked at all of them would have been the
    end of it."""
    world = a_run().until_step(7)
    whole, world.storage.disk = (
        dict(world.storage.disk),
        dict.fromkeys(world.storage.disk, "cannot be read: Stale file handle"),
    )
    world.kill_rank(0)
    world.run()
    world.start_supervisor()
    world.run()
    assert len(world.events(RunHalted)) == 2, "it is not mended yet"
    world.storage.disk = whole
    world.start_supervisor()
    world.run()
    assert [entry.step for entry in world.entries(AttemptStarted)] == [0, 6]
    assert code_of(world) == DONE


def test_before_the_first_checkpoint_a_restart_begins_from_the_initial_weights() -> None:
    world = a_run().until_step(2)
    world.kill_rank(0)
    world.run()
    second = world.entries(AttemptStarted)[1]
    assert (second.step, second.event.checkpoint, second.event.parent) == (0, "", "")
    assert code_of(world) == DONE


@pytest.mark.parametrize("value", in_force(make_config(), (), 0))
def test_a_different_value_in_force_halts_and_is_named(value: str) -> None:
    world = World(make_config())
    world.wrong_value = value
    world.start_supervisor()
    world.run()
    (halted,) = world.events(RunHalted)
    assert halted.cause == "config"
    assert f"{value}: expected" in halted.question
    assert "in force" in halted.question
    assert world.living(1) == []


def test_a_new_supervisor_adopts_ranks_that_train() -> None:
    world = a_run().until_step(4)
    world.kill_supervisor()
    world.second()
    world.start_supervisor()
    world.run()
    assert world.events(AgentsAdopted) == [AgentsAdopted(1, ("n0", "n1"))]
    assert len(world.events(AttemptStarted)) == 1
    assert code_of(world) == DONE


def test_a_rank_that_died_unseen_is_a_failure_of_its_generation() -> None:
    world = a_run().until_step(4)
    world.kill_supervisor()
    world.kill_rank(1)
    world.second()
    world.start_supervisor()
    world.run()
    (diagnosed,) = world.events(IncidentDiagnosed)
    assert diagnosed.cause == "killed", "the agent kept the word of its end"
    assert code_of(world) == DONE


def test_ranks_of_another_lineage_are_not_adopted() -> None:
    world = a_run().until_step(4)
    world.kill_supervisor()
    world.second()
    world.start_supervisor(
        config_sha256="c1", opens_lineage=True, lineage_difference=("optim.lr: 1 -> 2",)
    )
    world.run()
    assert world.events(LineageOpened)[1] == LineageOpened(2, "c1", ("optim.lr: 1 -> 2",))
    second = world.entries(AttemptStarted)[1]
    assert (second.attempt, second.event.parent) == ("2.00", "1.00")
    assert world.events(IncidentDiagnosed)[0].cause == "none"


def test_a_commit_told_again_after_a_supervisors_death_happens_once() -> None:
    for boundary in range(60):
        world = a_run().until_step(2)
        world.lives = boundary
        for _ in range(8):
            world.second()
        if world.core is None:
            world.start_supervisor()
        world.lives = None
        world.run()
        paths = [c.path for c in world.events(CheckpointCommitted)]
        assert len(paths) == len(set(paths)), f"boundary {boundary}"
        assert "checkpoints/1.00/step-00000003" in paths, f"boundary {boundary}"


def test_a_failed_commit_and_a_failed_save_are_abandoned_and_training_goes_on() -> None:
    for fault in (1, -1):
        world = a_run()
        world.storage.fail_commits = fault
        world.run()
        (abandoned,) = world.events(SaveAbandoned)
        assert "No space left on device" in abandoned.why
        assert [e.step for e in world.entries(CheckpointCommitted)] == [6, 9]
        assert code_of(world) == DONE


def test_a_manifest_that_lands_after_its_attempt_is_journalled_and_not_restored() -> None:
    """A late commit belongs to steps that were done again: it is on record and off the live
    chain."""
    world = a_run().until_step(5)
    world.kill_rank(0)
    world.until(TrainingBegan, 2)
    world.storage.disk["checkpoints/1.00/step-00000005"] = ""
    late = ManifestCommitted("checkpoints/1.00/step-00000005", "1.00", 5, "", "sha", 10, 2, 0.1)
    world.feed(late)
    world.feed(late)
    assert [c.path for c in world.events(CheckpointCommitted)].count(late.path) == 1
    world.kill_rank(0)
    world.until(AttemptStarted, 3)
    assert world.entries(AttemptStarted)[2].step == 3


def test_retention_keeps_the_newest_two_and_what_this_attempt_restored() -> None:
    world = a_run(steps=16).run()
    assert [c.path[-2:] for c in world.events(CheckpointRetired)] == ["03", "06", "09", "12"]
    assert sorted(world.storage.disk) == [
        "checkpoints/1.00/step-00000015",
        "checkpoints/1.00/step-00000016",
    ]


def test_metrics_of_an_older_generation_are_fenced_off_and_repeats_are_dropped() -> None:
    world = a_run().until_step(4)
    world.kill_rank(0)
    world.until(TrainingBegan, 2)
    assert world.core is not None
    before = len([e for e in world.effects if isinstance(e, WriteMetrics)])
    world.feed(MetricsReceived("n0", 1, {"step": 99, "loss": 0.0}))
    newest = world.core.view.training.history.step
    assert newest > 0
    world.feed(MetricsReceived("n0", 2, {"step": newest, "loss": 0.0}))
    assert len([e for e in world.effects if isinstance(e, WriteMetrics)]) == before


def test_hangs_are_found_by_their_root_and_name_the_phase() -> None:
    """The ranks that wait for a stopped one exceed their limits too; they are its victims."""
    world = a_run().until_step(4)
    world.stop_rank(1)
    world.run()
    (seen,) = world.events(FailureSeen)
    assert (seen.node, seen.rank, seen.sign) == ("n1", 1, "hang")
    assert "in phase step of step 4" in seen.what
    assert world.events(IncidentDiagnosed)[0].cause == "hang"
    assert code_of(world) == DONE


def test_a_stopped_rank_is_named_though_its_waiting_peer_exceeds_its_limit_first() -> None:
    """Peers may be further in their phase than the stopped one: until that one exceeds its limit,
    nobody is named."""
    world = a_run().until_step(4)
    for rank, ago in ((0, 4.0), (1, 0.0)):
        found = world.find(rank)
        assert found is not None
        assert found[1].rank is not None
        found[1].rank.phase, found[1].rank.since = "checkpoint", world.now - ago
    world.stop_rank(1)
    world.run()
    seen = world.events(FailureSeen)
    assert [(s.node, s.rank, s.sign) for s in seen] == [("n1", 1, "hang")]
    assert "its process is stopped" in seen[0].what
    assert code_of(world) == DONE


def limit_of(world: World, phase: str, first: bool) -> float:
    assert world.core is not None
    return world.core.view.training.timeouts.limit(phase, first)


def test_timeouts_are_learned_from_what_the_pulses_show() -> None:
    world = a_run(steps=30, slots_per_node=2)
    assert limit_of(world, "start", True) == 15.0
    assert limit_of(world, "step", False) == 8.0
    world.until_step(9)
    assert limit_of(world, "start", True) == 6.0, "three times two seconds, of four ranks"
    assert limit_of(world, "step", False) == 6.0, (
        "three times two seconds, of four ranks and six steps"
    )


def test_timeouts_are_learned_from_what_the_metrics_say() -> None:
    world = a_run(steps=30)
    world.durations = {"step_seconds": 5.0, "data_seconds": 0.1}
    assert (limit_of(world, "step", False), limit_of(world, "data", False)) == (8.0, 8.0)
    world.until_step(2)
    assert (limit_of(world, "step", True), limit_of(world, "data", True)) == (15.0, 15.0)
    assert (limit_of(world, "step", False), limit_of(world, "data", False)) == (8.0, 8.0), (
        "first steps count apart"
    )
    world.until_step(5)
    assert limit_of(world, "step", False) == 15.0, "three times what one line says"
    assert limit_of(world, "data", False) == 8.0, "it is shorter, and not yet known well"
    world.until_step(26)
    assert limit_of(world, "data", False) == 6.0, "never shorter than the configured minimum"


def test_a_checkpoint_ten_times_longer_that_moves_is_no_hang() -> None:
    world = a_run().until_step(4)
    world.groups[1].slow_save_until = world.now + 120
    for agent in world.agents.values():
        for slot in agent.slots:
            if slot.rank is not None:
                slot.rank.phase = "checkpoint"
    world.run()
    assert world.events(FailureSeen) == []
    assert code_of(world) == DONE


def test_a_node_that_never_dials_in_is_replaced() -> None:
    world = a_run()
    world.agents["n1"].link_until = 1e9
    world.run()
    assert world.events(NodeFailed)[0].node == "n1"
    assert any(isinstance(e, FenceNode) and e.node == "n1" for e in world.effects), (
        "fenced before it is given up"
    )
    assert world.events(AttemptStarted)[0].nodes == ("n0", "n2")


def test_a_buffer_node_that_dies_is_out_without_an_incident() -> None:
    world = a_run().until_step(4)
    world.lose_node("n2")
    world.run()
    assert world.events(NodeFailed) == [NodeFailed("n2", 0, "node_failure")]
    assert world.events(FailureSeen) == []
    assert code_of(world) == DONE


def test_a_stranger_is_told_to_leave() -> None:
    """An agent of another allocation that knows the secret still has no place here."""
    world = a_run().until_step(2)
    world.start_agent("n9")
    world.second()
    world.second()
    assert any(
        isinstance(e, Send) and e.node == "n9" and isinstance(e.command, Leave)
        for e in world.effects
    )


def test_what_a_person_sees_changes_at_most_twice_a_second() -> None:
    world = a_run().run()
    times = [k for k, e in enumerate(world.effects) if isinstance(e, Show)]
    seconds = world.now - 1000.0
    assert 5 <= len(times) <= 2 * seconds + 1
    last = world.effects[times[-1]]
    assert isinstance(last, Show)
    assert (last.attempt, last.steps, last.active_nodes, last.buffer_nodes) == ("1.00", 9, 2, 1)


def test_times_in_the_journal_are_milliseconds() -> None:
    world = a_run().run()
    entries = [e.entry for e in world.effects if isinstance(e, Append)]
    assert all(entry.time == round(entry.time, 3) for entry in entries)


@pytest.mark.parametrize(
    ("code", "text", "waits"),
    [
        (None, "", False),
        (1, "torch.OutOfMemoryError: CUDA out of memory.", False),
        # A probe may yet say what is behind it.
        (1, "", True),
    ],
)
def test_what_is_certain_is_not_waited_for(code: int | None, text: str, waits: bool) -> None:
    world = a_run(settle_seconds=8.0).until_step(4)
    world.kill_rank(1, code=code, text=text)
    world.until(IncidentDiagnosed)
    seen, diagnosed = world.entries(FailureSeen)[0], world.entries(IncidentDiagnosed)[0]
    assert (diagnosed.time - seen.time >= 8.0) == waits
