"""No buffer node is left: the run goes on with those that are left, asks for others and grows back
at a checkpoint."""

import pytest
from opt_logbook.record.verify import verify

from tests.end_to_end import driving
from tests.slurm.site import UNABLE, Site

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(UNABLE), reason=UNABLE),
]


SMALL = ("train.micro_batch=2", *driving.ENDLESS)


def test_a_run_shrinks_to_what_is_left_and_grows_when_a_node_comes_free(site: Site) -> None:
    others = ("sbatch", "--parsable", "--nodelist=n4", "--exclusive", "--wrap", "sleep 10000")
    someone_elses = site.slurm.run(*others, cwd=site.folder).strip()
    site.submit("cluster.nodes=3", "cluster.min_nodes=2", *SMALL)
    site.wait_for(lambda: driving.newest_step(site.run) >= 12)
    site.slurm.kill_node("n2")
    site.wait_for(lambda: len(driving.of_kind(site.run, "training_began")) == 2)
    [vacated] = [entry.event for entry in driving.of_kind(site.run, "place_vacated")]
    assert (vacated.node, vacated.nodes) == ("n2", 2)
    # What is asked for waits in the queue, and it does not ask for the node that failed.
    site.wait_for(lambda: len(site.jobs()) == 4, what="nothing was asked for")

    site.slurm.run("scancel", someone_elses)
    site.wait_for(lambda: len(driving.of_kind(site.run, "training_began")) == 3)
    started = [entry.event for entry in driving.of_kind(site.run, "attempt_started")]
    assert [s.nodes for s in started] == [("n1", "n2", "n3"), ("n1", "n3"), ("n1", "n4", "n3")]
    assert [s.world_size for s in started] == [3, 2, 3]
    assert len(driving.of_kind(site.run, "failure_seen")) == 1

    # A supervisor that comes back adopts both allocations.
    site.slurm.run("scontrol", "requeue", site.job)
    site.wait_for(lambda: len(driving.of_kind(site.run, "agents_adopted")) == 1)
    assert driving.of_kind(site.run, "agents_adopted")[0].event.nodes == ("n1", "n4", "n3")
    site.say("stop", str(site.run.path))
    site.wait_for(lambda: site.jobs() == [])
    assert verify(site.run) == []
    story = (site.run.chronicle / "chronicle.md").read_text()
    assert "the run went on with 2 nodes" in story
