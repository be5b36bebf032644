"""Checkpoints that agents hold: what a restart takes when ranks, nodes, partners or all of a domain
are gone."""

import time
from dataclasses import replace

import pytest
from opt_logbook.record.events import (
    AttemptStarted,
    CheckpointCommitted,
    CheckpointRejected,
    CheckpointRetired,
    Entry,
    IncidentClosed,
    OrderEnded,
    RunStopped,
    SaveAbandoned,
)

from opt_train.protocol.commands import Drop, Fetch
from opt_train.protocol.exits import DONE
from opt_train.protocol.facts import AgentState, Fetched, SnapshotFiles
from opt_train.run.attempt import Attempt
from opt_train.run.checkpoint import MEMORY, Checkpoint, path_of_save
from opt_train.run.state import RunState
from opt_train.simulation.actors import make_config
from opt_train.simulation.world import World
from opt_train.supervisor.cluster_view import ClusterView
from opt_train.supervisor.effects import Send
from opt_train.supervisor.inputs import AgentConnected, Now
from opt_train.supervisor.rules.context import Context, Decision
from opt_train.supervisor.rules.snapshots import (
    bring_together,
    copy_to_partners,
    own_names,
    partners,
)

HELD: dict[str, object] = {"memory_every_steps": 3, "every_steps": 12, "steps": 24}


def a_run(**changes: object) -> World:
    world = World(make_config(**{**HELD, **changes}))
    world.start_supervisor()
    return world


def restarts(world: World) -> list[tuple[str, int | None]]:
    """(tier, step) of what each attempt but the first began with."""
    begun: list[Entry] = world.entries(AttemptStarted)[1:]
    return [(entry.event.checkpoint.split("/")[0], entry.step) for entry in begun]


def finished(world: World) -> World:
    world.run()
    assert world.finish is not None
    assert world.finish.code == DONE
    return world


def until_copied(world: World, step: int) -> World:
    """Until `step` is done and each part of the newest snapshot is held twice."""
    world.until_step(step)
    for _ in range(20):
        made = [c for c in world.replayed.checkpoints if c.tier == "memory" and c.step >= step]
        held = (
            [name for agent in world.agents.values() for name in agent.held.get(made[-1].path, ())]
            if made
            else []
        )
        if held and all(held.count(name) == 2 for name in set(held)):
            return world
        world.second()
    raise AssertionError(f"{made} is not copied: {held}")


def held_everywhere(world: World) -> set[str]:
    return {path for agent in world.agents.values() for path in agent.held}


def test_a_killed_rank_costs_the_steps_since_the_newest_snapshot() -> None:
    world = a_run().until_step(8)
    world.kill_rank(1)
    finished(world)
    assert restarts(world) == [("memory", 6)]
    (closed,) = world.events(IncidentClosed)
    assert closed.steps_lost == 2, "from the file system it would have been all eight"


def test_a_lost_node_is_replaced_and_its_part_comes_from_its_partner() -> None:
    world = until_copied(a_run(), 6)
    world.lose_node("n1")
    finished(world)
    assert restarts(world) == [("memory", 6)]
    assert world.events(AttemptStarted)[1].nodes == ("n0", "n2")
    fetched = [
        e.command
        for e in world.effects
        if isinstance(e, Send) and e.node == "n2" and isinstance(e.command, Fetch)
    ]
    assert fetched[0].names == ("shard-00001.safetensors",)
    assert fetched[0].sources == {"shard-00001.safetensors": "n0"}


def test_a_lost_pair_of_partners_falls_back_to_the_file_system() -> None:
    world = until_copied(a_run(nodes=3, buffer_nodes=2), 15)
    for node in ("n0", "n1"):  # n1 holds the copies of n0
        world.lose_node(node)
    finished(world)
    assert restarts(world) == [("checkpoints", 12)]
    rejected = world.events(CheckpointRejected)
    assert {event.why for event in rejected} == {
        "no node that is left holds shard-00000.safetensors"
    }
    assert len(rejected) == 2, "as many as are held, each said once"


def test_a_lost_domain_costs_no_more_than_a_lost_rank() -> None:
    world = until_copied(a_run(nodes=4, buffer_nodes=2, nodes_per_domain=2), 15)
    for node in ("n0", "n1"):
        world.lose_node(node)
    finished(world)
    assert restarts(world) == [("memory", 15)]
    assert not world.events(CheckpointRejected)


def test_neighbours_as_partners_would_not_have_survived_it() -> None:
    """The test above is of the domains and not of luck."""
    world = until_copied(a_run(nodes=4, buffer_nodes=2, nodes_per_domain=1), 15)
    for node in ("n0", "n1"):
        world.lose_node(node)
    finished(world)
    assert restarts(world) == [("checkpoints", 12)]


def test_a_spoiled_part_is_got_from_the_partner_and_both_spoiled_cost_one_snapshot() -> None:
    world = until_copied(a_run(), 3)
    newest = max(world.agents["n0"].held)
    name = "shard-00000.safetensors"
    world.agents["n0"].spoiled.add((newest, name))
    world.kill_rank(1)
    world.until(AttemptStarted, 2)
    assert restarts(world) == [("memory", int(newest[-8:]))]
    until_copied(world, 15)
    newest = max(world.agents["n0"].held)
    for agent in world.agents.values():
        agent.spoiled.add((newest, name))
    world.kill_rank(1)
    finished(world)
    (rejected,) = world.events(CheckpointRejected)
    assert rejected.path == newest
    assert restarts(world)[1] == ("memory", int(newest[-8:]) - 3)


def test_a_run_that_has_saved_nothing_and_lost_its_snapshots_begins_again() -> None:
    world = a_run(nodes=2, buffer_nodes=2, every_steps=24).until_step(5)
    for node in ("n0", "n1"):
        world.lose_node(node)
    finished(world)
    assert restarts(world) == [("", 0)]


def test_the_ring_holds_what_the_key_says_and_agents_hold_nothing_else() -> None:
    world = a_run(memory_keep=3).until_step(17)
    memory = [c.step for c in world.replayed.checkpoints if c.tier == "memory"]
    assert len(memory) == 3
    assert memory == sorted(memory)
    world.second()
    assert len(held_everywhere(world)) <= 4, "those, and one that is on its way"
    assert world.events(CheckpointRetired)[0].path == "memory/1.00/step-00000000"
    finished(world)
    assert not world.agents


def test_an_agent_that_missed_a_drop_is_told_again() -> None:
    world = a_run().until_step(3)
    world.cut_link("n1", 5)
    for _ in range(3):
        world.second()
    world.agents["n1"].held["memory/9.99/step-00000001"] = {"shard-00001.safetensors"}
    world.until_step(9)
    assert "memory/9.99/step-00000001" not in world.agents["n1"].held
    assert Send("n1", Drop("memory/9.99/step-00000001")) in world.effects


def test_a_new_supervisor_lets_agents_keep_what_they_have_not_told_it_of_yet() -> None:
    """They say what they hold when they dial in, and only then that it is a snapshot of which all
    parts are there."""
    world = a_run().until_step(6)
    world.kill_supervisor()
    assert world.replayed.newest_good() == next(
        c for c in world.replayed.checkpoints if c.step == 3
    )
    world.start_supervisor()
    world.until_step(8)
    (newest,) = [c for c in world.replayed.checkpoints if c.step == 6]
    held = [name for agent in world.agents.values() for name in agent.held.get(newest.path, ())]
    assert {"shard-00000.safetensors", "shard-00001.safetensors"} <= set(held)
    assert not [e for e in world.effects if isinstance(e, Send) and e.command == Drop(newest.path)]


def test_answers_about_snapshots_that_are_gone_are_not_remembered() -> None:
    """A run may take a snapshot a minute for weeks."""
    world = a_run(memory_every_steps=1, node_every_steps=2, every_steps=12)
    world.until_step(20)
    assert world.core is not None
    remembered = world.core.view.inventory.fetched
    assert len(remembered) <= len(world.replayed.checkpoints) + 2, sorted(remembered)
    live = {checkpoint.path for checkpoint in world.replayed.checkpoints}
    asked = {key[3] for key in world.core.view._sent._sent if key[0] == Fetch.kind}
    assert len(asked - live) <= 2, sorted(asked)


def a_snapshot_of_124_nodes(config_sha256: str = "c0") -> tuple[Context, Checkpoint]:
    """Each node holds its own part. A supervisor decides with every pulse, of which they send 124 a
    second."""
    world = World(make_config(nodes=124, buffer_nodes=0, slots_per_node=8))
    world.start_supervisor()
    assert world.core is not None
    view, path = world.core.view, path_of_save("1.00", 3, MEMORY)
    attempt = Attempt("1.00", 1, 0, world.names, 992)
    for k, (node, names) in enumerate(own_names(attempt).items()):
        agent = AgentState(node, 1, (), 0, (SnapshotFiles(path, names),), f"10.0.0.{k}:4000")
        view.apply_input(AgentConnected(node, agent), Now(1.0, 1.0), world.replayed)
    made = Checkpoint(path, "1.00", 3, "sha", world_size=992, config_sha256=config_sha256)
    state = replace(world.replayed, attempt=attempt, checkpoints=(made,))
    return Context(state, view, world.config, world.core.identity), made


def sends(s: Context, decisions: list[Decision]) -> int:
    """How many commands there are; they are sent."""
    for decision in decisions:
        assert isinstance(decision, Send)
        s.view.mark_sent(decision)
    return len(decisions)


@pytest.mark.parametrize("config_sha256", ["c0", "c1"])
def test_what_124_nodes_bring_together_does_not_hold_the_supervisor_up(config_sha256: str) -> None:
    situation, wanted = a_snapshot_of_124_nodes(config_sha256)
    assert sends(situation, bring_together(situation, wanted)) == 124
    began = time.process_time()
    for _ in range(10):
        assert not bring_together(situation, wanted)
    assert time.process_time() - began < 3.0


def test_partners_of_124_nodes_do_not_hold_the_supervisor_up() -> None:
    situation, made = a_snapshot_of_124_nodes()
    assert sends(situation, copy_to_partners(situation)) == 124
    names = own_names(situation.attempt)
    for node, partner in partners(situation, situation.attempt).items():
        situation.view.inventory.apply_fetched(partner, Fetched(made.path, names[node]))
    began = time.process_time()
    for _ in range(124):
        assert not copy_to_partners(situation)
    assert time.process_time() - began < 1.0


def test_a_snapshot_that_not_all_ranks_took_is_given_up() -> None:
    world = a_run(slots_per_node=2, nodes=1).until_step(5)
    world.snapshots_missed = {6: 1}
    finished(world)
    given_up = world.entries(SaveAbandoned)
    assert [(entry.step, entry.event.why) for entry in given_up] == [(6, "not all ranks took it")]
    assert 6 not in [
        entry.step for entry in world.entries(CheckpointCommitted) if entry.event.tier == "memory"
    ]


def test_the_nodes_own_disks_outlive_their_agents() -> None:
    """The supervisor is away for so long that the agents leave: what they held in memory is gone
    with them."""
    world = a_run(node_every_steps=6, every_steps=100).until_step(17)
    world.kill_supervisor()
    for _ in range(30):
        world.second()
    assert not world.agents
    world.start_supervisor()
    finished(world)
    (restart,) = restarts(world)
    assert restart == ("node", 12)
    assert {event.path.split("/")[0] for event in world.events(CheckpointRejected)} == {"memory"}


def test_a_finished_run_leaves_nothing_on_the_nodes() -> None:
    world = a_run(node_every_steps=3).until_step(10)
    assert any(world.node_disks.values())
    finished(world)
    assert not any(world.node_disks.values())


def test_a_stop_passes_its_snapshot_on_to_the_disks_whatever_its_step() -> None:
    """The scheduler's grace may not last for the file system."""
    world = a_run(node_every_steps=100, memory_every_steps=5, every_steps=100).until_step(7)
    world.snapshot_at_stop = True
    world.ask_stop()
    for _ in range(60):
        if world.finish is not None:
            break
        world.second()
    tiers = {(e.event.tier, e.step) for e in world.entries(CheckpointCommitted)}
    (stopped,) = world.events(RunStopped)
    assert {
        ("memory", stopped.saved_step),
        ("node", stopped.saved_step),
        ("shared", stopped.saved_step),
    } <= tiers
    assert not [c for c in world.replayed.checkpoints if c.tier == "memory"], "gone with the agents"


def test_a_run_that_was_ended_in_the_middle_of_its_stop_goes_on_when_it_is_started_again() -> None:
    """By a scheduler whose grace was over, say: whoever starts it again has not started it to be
    told that it stops."""
    world = a_run(node_every_steps=100, every_steps=100).until_step(7)
    world.snapshot_at_stop = True
    world.ask_stop()
    while "node" not in {event.tier for event in world.events(CheckpointCommitted)}:
        world.second()
    world.kill_supervisor()
    for node in world.names:
        world.lose_node(node)
    world.snapshot_at_stop = False
    world.start_supervisor()
    world.until(AttemptStarted, 2)
    assert [event.outcome for event in world.events(OrderEnded)][-1] == "superseded"
    assert restarts(world)[0][0] == "node"
    finished(world)


def test_a_stop_is_carried_out_by_the_next_supervisor_where_agents_outlive_the_change() -> None:
    world = a_run().until_step(7)
    world.ask_stop()
    world.kill_supervisor()
    for _ in range(3):
        world.second()
    world.start_supervisor()
    world.run()
    assert world.events(RunStopped)
    assert len(world.events(AttemptStarted)) == 1


@pytest.mark.parametrize(
    ("nodes", "size", "expected"),
    [
        (1, 1, "0"),
        (2, 1, "10"),
        (3, 1, "120"),
        (4, 2, "2301"),
        (4, 4, "1230"),  # one domain: a neighbour is better than nobody
        (3, 2, "221"),
        (6, 2, "234501"),
        (5, 2, "23401"),
    ],
)
def test_partners_are_in_other_domains(nodes: int, size: int, expected: str) -> None:
    world = World(make_config(nodes=nodes, buffer_nodes=0, nodes_per_domain=size))
    world.start_supervisor()
    assert world.core is not None
    names = tuple(f"n{k}" for k in range(nodes))
    attempt = Attempt("1.00", 1, 0, names, nodes)
    view = ClusterView(world.config, Now(0.0, 0.0), names)
    situation = Context(
        replace(RunState(), attempt=attempt), view, world.config, world.core.identity
    )
    found = partners(situation, attempt)
    assert "".join(found[node][1:] for node in names) == expected
