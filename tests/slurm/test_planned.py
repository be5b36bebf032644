"""What is planned costs no step: the nodes' time limit, and a node that an admin wants back."""

import pytest
from opt_logbook.record.verify import verify

from tests.end_to_end import driving
from tests.slurm.site import UNABLE, Site

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(UNABLE), reason=UNABLE),
]


def test_at_the_time_limit_of_its_nodes_a_run_saves_and_goes_on_with_others(site: Site) -> None:
    site.submit(
        "cluster.nodes=2",
        *driving.ENDLESS,
        "cluster.slurm.time_limit=00:02:00",
        "cluster.slurm.stop_before_seconds=80",
    )
    site.wait_for(lambda: len(driving.of_kind(site.run, "attempt_started")) == 2, 240)
    [stopped] = driving.of_kind(site.run, "run_stopped")
    assert stopped.event.by == "the time limit of the nodes"
    first, second = driving.of_kind(site.run, "attempt_started")
    assert second.step == stopped.event.saved_step > first.step, "steps were lost"
    site.wait_for(lambda: len(driving.of_kind(site.run, "training_began")) == 2)
    assert driving.of_kind(site.run, "failure_seen") == []
    # A stop by a person ends it for good, though the limit of the new nodes comes near as well.
    site.say("stop", str(site.run.path))
    site.wait_for(lambda: site.jobs() == [])
    assert len(driving.of_kind(site.run, "attempt_started")) == 2
    assert verify(site.run) == []


def test_a_drained_node_is_replaced_when_its_work_is_saved(site: Site) -> None:
    site.submit("cluster.nodes=2", "cluster.buffer_nodes=1", *driving.ENDLESS)
    site.wait_for(lambda: driving.newest_step(site.run) >= 12)
    site.slurm.run("scontrol", "update", "nodename=n2", "state=drain", "reason=new DIMM")
    site.wait_for(lambda: len(driving.of_kind(site.run, "training_began")) == 2)
    first, second = driving.of_kind(site.run, "attempt_started")
    # Which node stands by Slurm says: one may still be in the hands of the test before.
    assert first.event.nodes == ("n1", "n2")
    assert second.event.nodes[0] == "n1"
    assert second.event.nodes[1] not in first.event.nodes
    noted = driving.of_kind(site.run, "finding_noted")[0].event
    assert noted.evidence[0].text == "drained: new DIMM"
    assert driving.of_kind(site.run, "failure_seen") == []
    site.say("stop", str(site.run.path))
    site.wait_for(lambda: site.jobs() == [])
    story = (site.run.chronicle / "chronicle.md").read_text()
    assert "n2" in story
    assert "new DIMM" in story
