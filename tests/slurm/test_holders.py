"""Whoever holds the nodes, the run lives through the loss of the first of them, and in the end no
node is forgotten."""

import os
import signal

import pytest
from opt_logbook.record.verify import verify

from tests.end_to_end import driving
from tests.slurm.site import UNABLE, Site, supervisors

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(UNABLE), reason=UNABLE),
]


def test_a_job_that_sleeps_holds_the_nodes_where_salloc_is_forbidden(site: Site) -> None:
    site.submit(
        "cluster.slurm.holder=job",
        "cluster.nodes=2",
        "cluster.buffer_nodes=1",
        *driving.ENDLESS,
        "cluster.slurm.ask_for_others=false",
        "supervisor.orphan_seconds=20",
    )
    site.wait_for(lambda: driving.newest_step(site.run) >= 12)
    [holder] = site.allocations()
    assert site.slurm.job(holder)["BatchFlag"] == "1"

    # The node of the script that sleeps: Slurm keeps the job on the others.
    site.slurm.kill_node("n1")
    site.wait_for(lambda: len(driving.of_kind(site.run, "training_began")) == 2)
    assert set(driving.of_kind(site.run, "attempt_started")[-1].event.nodes) == {"n2", "n3"}
    assert site.allocations() == [holder]

    # Found again by the next supervisor, by its name.
    [pid] = supervisors(site)
    os.kill(pid, signal.SIGKILL)
    site.wait_for(lambda: len(driving.of_kind(site.run, "agents_adopted")) == 1)
    assert site.allocations() == [holder]

    # And cancelled, by its name, by agents that nobody leads.
    site.slurm.run("scancel", site.job)
    site.wait_for(lambda: site.allocations() == [], 120, what="the holder was forgotten")
    assert verify(site.run) == []


def test_inside_one_job_the_run_lives_through_the_loss_of_any_node(site: Site) -> None:
    site.submit(
        "cluster=slurm-inside",
        "cluster.nodes=2",
        "cluster.buffer_nodes=1",
        *driving.ENDLESS,
        "cluster.slurm.ask_for_others=false",
        "supervisor.orphan_seconds=15",
    )
    site.wait_for(lambda: driving.newest_step(site.run) >= 12)
    assert site.jobs() == [site.job]
    first, *others = driving.of_kind(site.run, "attempt_started")[-1].event.nodes

    # A supervisor that is killed begins again on its node, and training does not pause.
    [pid] = supervisors(site)
    os.kill(pid, signal.SIGKILL)
    site.wait_for(lambda: len(driving.of_kind(site.run, "agents_adopted")) == 1)
    assert len(driving.of_kind(site.run, "attempt_started")) == 1

    # Another node is swapped, as ever.
    site.slurm.kill_node(others[0])
    site.wait_for(lambda: len(driving.of_kind(site.run, "training_began")) == 2)
    assert site.slurm.job(site.job)["Restarts"] == "0"

    # The supervisor's own node: the agents have the job queued again.
    site.slurm.boot_node(others[0])
    before = len(driving.of_kind(site.run, "training_began"))
    site.slurm.kill_node(first)
    site.wait_for(lambda: site.slurm.job(site.job)["Restarts"] == "1", 180, what="queued again")
    site.wait_for(
        lambda: len(driving.of_kind(site.run, "training_began")) > before, 180, what="went on"
    )
    assert site.jobs() == [site.job], "a second job"
    last = driving.of_kind(site.run, "attempt_started")[-1].event
    assert first not in last.nodes
    assert others[0] not in last.nodes, "a node that failed was used again"
    assert len(set(last.nodes)) == 2
    assert last.checkpoint, "from scratch"

    site.say("stop", str(site.run.path))
    site.wait_for(lambda: site.jobs() == [])
    site.wait_for(lambda: driving.processes_of(site.folder) == [], what="processes were left")
    assert driving.of_kind(site.run, "run_stopped")[-1].event.saved_step > 0
    assert verify(site.run) == []


def test_a_cancelled_job_that_holds_its_nodes_itself_saves_and_stays_cancelled(site: Site) -> None:
    """Slurm signals supervisor, agents and ranks at once, and kills them 30 s later."""
    site.submit("cluster=slurm-inside", "cluster.nodes=2", *driving.ENDLESS)
    site.wait_for(lambda: driving.newest_step(site.run) >= 12)
    site.slurm.run("scancel", site.job)
    site.wait_for(lambda: site.slurm.job(site.job)["JobState"] not in ("RUNNING", "COMPLETING"))
    job = site.slurm.job(site.job)
    logs = "\n".join(log.read_text() for log in site.run.submit.glob("*.log"))
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0"), logs
    stopped = driving.of_kind(site.run, "run_stopped")[-1].event
    assert stopped.saved_step == driving.newest_step(site.run), "steps were lost"
    assert driving.of_kind(site.run, "failure_seen") == [], "a cancelled job is no failure"
    assert verify(site.run) == []
    assert driving.processes_of(site.folder) == []
