"""From the login node: a run whose supervisor waits in the queue is stopped; one that trains is
held, stays held though it is submitted again, and goes on when it is resumed."""

import pytest
from opt_logbook.record.verify import verify

from tests.end_to_end import driving
from tests.slurm.site import UNABLE, Site

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(UNABLE), reason=UNABLE),
]


def test_a_run_is_stopped_in_the_queue_and_held_while_it_trains(site: Site) -> None:
    others = ("sbatch", "--parsable", "--partition=service", "--nodes=3", "--exclusive")
    blocker = site.slurm.run(*others, "--wrap", "sleep 10000", cwd=site.folder)
    site.submit("cluster.nodes=2", *driving.ENDLESS)
    status = site.say("status", "name=run")
    assert f"Slurm job {site.job}" in status
    assert f"cancelled Slurm job {site.job}" in site.say("stop", "name=run")
    site.slurm.run("scancel", blocker)
    site.wait_for(lambda: site.jobs() == [], what="the queued supervisor was not cancelled")

    site.submit("cluster.nodes=2", *driving.ENDLESS)
    site.wait_for(lambda: driving.newest_step(site.run) >= 12)
    assert "opt-train resume" in site.say("hold", "name=run", "--reason", "the data are wrong")
    site.wait_for(lambda: site.jobs() == [], what="the nodes were not given back")
    held = site.say("status", "name=run")
    assert "the data are wrong" in held
    # Submitted again it begins nothing.
    before = len(driving.of_kind(site.run, "attempt_started"))
    script = str(site.run.submit / "supervisor.sbatch")
    site.slurm.run("sbatch", script, cwd=site.folder, environment=site.environment)
    site.wait_for(lambda: site.jobs() == [], what="a held run was begun")
    assert len(driving.of_kind(site.run, "attempt_started")) == before

    assert "submitted it again as Slurm job" in site.say("resume", "name=run")
    site.wait_for(lambda: len(driving.of_kind(site.run, "training_began")) == 2)
    first, second = driving.of_kind(site.run, "attempt_started")
    assert second.step >= 12 > first.step
    [site.job] = [job for job in site.jobs() if site.slurm.job(job)["Partition"] == "service"]
    site.say("stop", "name=run")
    site.wait_for(lambda: site.jobs() == [])
    assert verify(site.run) == []
