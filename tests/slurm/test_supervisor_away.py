"""The supervisor's job is killed, loses its node, is cut off, is cancelled for good: there is never
a second allocation nor a second generation, and in the end no node is forgotten."""

import os
import signal
import time

import pytest
from opt_logbook.record.verify import verify

from tests.end_to_end import driving
from tests.slurm.site import UNABLE, Site, supervisors

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(UNABLE), reason=UNABLE),
]


def test_ranks_train_on_without_their_supervisor(site: Site) -> None:
    adopted = 0

    def wait_until_adopted(what: str) -> None:
        """And see that training never paused: the steps are those of one attempt."""
        nonlocal adopted
        adopted += 1
        site.wait_for(
            lambda: len(driving.of_kind(site.run, "agents_adopted")) == adopted, what=what
        )
        before = driving.newest_step(site.run)
        site.wait_for(lambda: driving.newest_step(site.run) > before, what=what)
        assert len(site.allocations(running=True)) == 1, what
        assert len(driving.of_kind(site.run, "attempt_started")) == 1, what

    # One buffer node more than there is: what is asked for waits in the queue all the time.
    site.submit(
        "cluster.nodes=2",
        "cluster.buffer_nodes=3",
        *driving.ENDLESS,
        "supervisor.orphan_seconds=90",
    )
    site.wait_for(lambda: driving.newest_step(site.run) >= 12)

    [pid] = supervisors(site)
    os.kill(pid, signal.SIGKILL)
    wait_until_adopted("killed")

    first = site.node_of(site.job)
    site.slurm.cut_node(first)  # longer than Slurm's patience: the job begins again elsewhere
    wait_until_adopted("cut off")
    site.slurm.plug_node(first)
    # Its slurmd ends the old job for minutes yet, and one that begins there again is held
    # (docs/operations.md): an admin looks at such a node before it is used again.
    site.slurm.run("scontrol", "update", f"nodename={first}", "state=drain", "reason=cut off")
    site.wait_for(lambda: len(supervisors(site)) == 1, what="the one that was cut off stays")

    second = site.node_of(site.job)
    assert second != first
    site.slurm.kill_node(second)
    wait_until_adopted("power loss")
    assert driving.of_kind(site.run, "failure_seen") == []
    assert verify(site.run) == []

    # For good: nobody comes, so the agents end their ranks and give the nodes back.
    site.slurm.run("scancel", site.job)
    site.wait_for(lambda: site.allocations() == [], 180, what="the allocation was forgotten")
    site.wait_for(lambda: driving.processes_of(site.folder) == [], what="processes were left")
    began = time.monotonic()
    assert "interrupted" in site.say("status", str(site.run.path))
    assert time.monotonic() - began < 30
