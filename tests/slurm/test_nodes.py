"""`opt-train submit` on a real Slurm: a node loses power, another reports an uncontained ECC error;
both are swapped, and the chronicle names them."""

import pytest
from opt_logbook.record.verify import verify

from tests.end_to_end import driving
from tests.slurm import fake_nvml
from tests.slurm.site import UNABLE, Site

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(UNABLE), reason=UNABLE),
    pytest.mark.timeout(600),
]


def test_a_dead_node_and_one_with_a_bad_gpu_are_swapped(site: Site) -> None:
    site.submit("cluster.nodes=2", "cluster.buffer_nodes=2", "train.steps=500")
    site.wait_for(lambda: driving.newest_step(site.run) >= 12)
    site.slurm.kill_node("n2")
    site.wait_for(lambda: len(driving.of_kind(site.run, "training_began")) == 2)

    fake_nvml.set_values(site.slurm.disk("n1"), count=1, gpu0_ecc=1)
    site.wait_for(lambda: len(driving.of_kind(site.run, "training_began")) == 3)

    # The supervisor's job begins again; its ranks do not even notice.
    site.slurm.run("scontrol", "requeue", site.job)
    site.wait_for(lambda: len(driving.of_kind(site.run, "agents_adopted")) == 1)
    site.wait_for(lambda: driving.kinds(site.run)[-1] == "run_finished", 240)

    diagnosed = [entry.event for entry in driving.of_kind(site.run, "incident_diagnosed")]
    assert [(d.cause, d.node) for d in diagnosed] == [("node_failure", "n2"), ("gpu_ecc", "n1")]
    assert diagnosed[1].detail == "uncontained"
    seen = [entry.event for entry in driving.of_kind(site.run, "failure_seen")]
    assert seen[1].sign == "finding", "a rank died before the counter was read"
    assert "GPU 0 (GPU-fake-0000): volatile uncorrectable ECC errors 0 -> 1" in (
        diagnosed[1].evidence[0].text
    )
    promoted = [entry.event for entry in driving.of_kind(site.run, "node_promoted")]
    assert [(p.replaces, p.node) for p in promoted] == [("n2", "n3"), ("n1", "n4")]
    assert len(driving.of_kind(site.run, "attempt_started")) == 3
    assert verify(site.run) == []
    story = (site.run.chronicle / "chronicle.md").read_text()
    assert "n2" in story
    assert "n1" in story
    assert "volatile uncorrectable ECC errors 0 -> 1" in story
    site.wait_for(lambda: site.jobs() == [])
