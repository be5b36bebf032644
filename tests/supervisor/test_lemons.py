"""A repeat offender stands by where another node can train, and its record reaches other runs."""

from dataclasses import replace

from opt_logbook.record.events import AttemptStarted, NodePromoted, RunFinished
from opt_logbook.record.hardware import Offence
from opt_logbook.record.node_events import ActionWithheld, LemonCleared, LemonNoted, LemonPassedOver

from opt_train.faults.config import FaultsConfig
from opt_train.protocol.exits import DONE
from opt_train.protocol.facts import GpusSeen, NodeGpu
from opt_train.run.lemons import DAY
from opt_train.simulation import links
from opt_train.simulation.actors import make_config
from opt_train.simulation.world import World
from tests.supervisor.started import code_of

NOW = 1.7e9 + 1000.0
"""Wall clock at which the virtual world begins."""


def offences(node: str, *days: float, gpu: str = "") -> tuple[Offence, ...]:
    return tuple(
        Offence(NOW - d * DAY, "before", node, "gpu_ecc", "uncontained", gpu) for d in days
    )


def a_run(*known: Offence, **changes: object) -> World:
    world = World(make_config(kind="slurm", **changes))
    world.offences = known
    world.start_supervisor()
    return world


def show_gpus(world: World, node: str, *uuids: str) -> None:
    gpus = tuple(NodeGpu(index, uuid) for index, uuid in enumerate(uuids))
    links.report(world, world.agents[node], GpusSeen(gpus))


def test_a_lemon_stands_by_from_the_start() -> None:
    world = a_run(*offences("n0", 1, 5))
    world.run()
    [noted] = world.events(LemonNoted)
    assert (noted.node, noted.why) == ("n0", "2 x gpu_ecc (uncontained) in 5 days, in run before")
    assert noted.offences == offences("n0", 1, 5)
    assert world.events(LemonPassedOver) == [LemonPassedOver("n0", "n2")]
    [started] = world.events(AttemptStarted)
    assert (started.nodes, started.buffer) == (("n2", "n1"), ("n0",))
    assert world.replayed.nodes["n0"].role == "buffer"
    assert code_of(world) == DONE


def test_one_failure_or_several_long_ago_make_no_lemon() -> None:
    world = a_run(*offences("n0", 1), *offences("n1", 90, 91, 92, 93))
    world.run()
    assert world.events(LemonNoted) == []
    assert world.events(AttemptStarted)[0].nodes == ("n0", "n1")


def test_where_there_is_no_other_node_a_lemon_trains() -> None:
    world = a_run(*offences("n0", 1, 5), *offences("n2", 1, 2))
    world.run()
    assert {noted.node for noted in world.events(LemonNoted)} == {"n0", "n2"}
    assert world.events(LemonPassedOver) == []
    assert world.events(AttemptStarted)[0].nodes == ("n0", "n1")
    assert code_of(world) == DONE


def test_of_two_buffer_nodes_the_healthy_one_is_promoted_and_the_lemon_is_the_last_resort() -> None:
    world = a_run(*offences("n2", 1, 5), buffer_nodes=2, steps=60).until_step(4)
    world.lose_node("n1")
    world.until_step(12)
    assert world.events(NodePromoted) == [NodePromoted("n3", "n1", 1)]
    world.lose_node("n0")
    world.run()
    assert world.events(NodePromoted)[-1] == NodePromoted("n2", "n0", 2)
    assert world.events(AttemptStarted)[-1].nodes == ("n2", "n3")
    assert code_of(world) == DONE


def test_a_lemon_that_was_passed_over_takes_another_place_and_leaves_its_own() -> None:
    """Its name is the name of a place that another node has by now."""
    world = a_run(*offences("n0", 1, 5), nodes=3, steps=60).until_step(4)
    assert world.events(AttemptStarted)[0].nodes == ("n3", "n1", "n2")
    world.lose_node("n2")
    world.until_step(12)
    assert world.events(AttemptStarted)[-1].nodes == ("n3", "n1", "n0")
    world.kill_supervisor()
    world.start_supervisor()
    world.kill_rank(0)
    world.run()
    assert world.events(AttemptStarted)[-1].nodes == ("n3", "n1", "n0")
    assert code_of(world) == DONE


def test_a_node_whose_gpu_was_exchanged_is_no_lemon_and_the_gpu_takes_its_record_along() -> None:
    world = a_run(*offences("n0", 1, 5, gpu="GPU-bad"))
    show_gpus(world, "n0", "GPU-new")
    show_gpus(world, "n1", "GPU-bad")
    world.run()
    assert [noted.node for noted in world.events(LemonNoted)] == ["n1"]
    assert world.events(AttemptStarted)[0].nodes == ("n0", "n2")


def test_one_that_was_taken_for_a_lemon_by_its_name_is_cleared_when_its_gpus_are_known() -> None:
    world = a_run(*offences("n0", 1, 5, gpu="GPU-bad"), steps=60).until_step(4)
    assert [noted.node for noted in world.events(LemonNoted)] == ["n0"]
    show_gpus(world, "n0", "GPU-new")
    world.run()
    assert world.events(LemonCleared) == [LemonCleared("n0", 0.0)]
    assert world.replayed.lemons == {}


def test_a_new_supervisor_goes_by_the_journal() -> None:
    world = a_run(*offences("n0", 1, 5), steps=40).until_step(4)
    world.kill_supervisor()
    world.offences = ()  # the record cannot be read
    world.start_supervisor()
    world.until_step(6)
    world.kill_rank(1)
    world.run()
    assert world.events(AttemptStarted)[-1].nodes == ("n2", "n1")
    assert len(world.events(RunFinished)) == 1


def test_what_a_run_takes_a_node_out_for_is_on_record_for_others() -> None:
    world = a_run(steps=60).until_step(4)
    world.publish_finding("n1", "gpu_ecc", "uncontained")
    world.run()
    [shared] = world.shared_offences
    assert (shared.run, shared.node, shared.cause, shared.detail) == (
        *("run", "n1"),
        *("gpu_ecc", "uncontained"),
    )
    assert world.replayed.offences == world.shared_offences


def test_a_supervisor_that_dies_before_it_has_written_the_record_leaves_it_to_the_next() -> None:
    world = a_run(steps=60).until_step(4)
    world.publish_finding("n1", "gpu_ecc", "uncontained")
    world.until_step(8)
    world.shared_offences = ()
    world.kill_supervisor()
    world.start_supervisor()
    world.run()
    assert [offence.node for offence in world.shared_offences] == ["n1"]


def test_neither_a_users_bug_nor_a_planned_fault_nor_a_process_that_plays_a_node_is_on_record() -> (
    None
):
    for world in (
        a_run(steps=30),
        World(make_config(steps=30)),
        World(replace(make_config(kind="slurm", steps=30), faults=FaultsConfig(plan="kill"))),
    ):
        if world.core is None:
            world.start_supervisor()
        world.until_step(4)
        if world.config.cluster.kind == "slurm" and not world.config.faults.plan:
            world.kill_rank(0, code=1, text="ValueError: bad")
        else:
            world.publish_finding("n1", "gpu_ecc", "uncontained")
        world.run()
        assert world.shared_offences == ()


def test_a_leashed_robot_says_whom_it_would_pass_over() -> None:
    world = a_run(*offences("n0", 1, 5), mode="advise")
    world.run()
    [withheld] = world.events(ActionWithheld)
    assert (withheld.action, withheld.nodes) == ("pass_over", ("n0",))
    assert "have n2 train in the place of n0, a repeat offender" in withheld.response
    assert world.events(AttemptStarted)[0].nodes == ("n0", "n1")
