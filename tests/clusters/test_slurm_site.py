"""What a site's Slurm grants, from what it says of itself: a power that is not there must not be
relied on, and one of which nothing is known must not be called either."""

from dataclasses import replace

import pytest

from opt_train.burn_in.site_power import Granted, SitePower
from opt_train.clusters.slurm_site import SlurmFacts, powers_of, settings_of

# Lines of a real `scontrol show config`, Slurm 22.05.8.
CONFIG = settings_of(
    """\
Configuration data as of 2026-11-29T02:34:51
AccountingStorageType   = accounting_storage/none
ClusterName             = lab
HealthCheckInterval     = 0 sec
HealthCheckProgram      = (null)
JobRequeue              = 1
JobSubmitPlugins        = (null)
KillWait                = 120 sec
RebootProgram           = (null)
SLURM_VERSION           = 22.05.8
SlurmUser               = slurm(64030)
SlurmdTimeout           = 10 sec
SuspendProgram          = (null)
""".splitlines()
)
PARTITION = {"PartitionName": "main", "AllocNodes": "ALL", "GraceTime": "0"}
FACTS = SlurmFacts(CONFIG, PARTITION, "", "alice", is_root=False)


def power(name: str, facts: SlurmFacts) -> SitePower:
    [found] = [p for p in powers_of(facts) if p.power == name]
    return found


def configured(**settings: str) -> SlurmFacts:
    return replace(FACTS, config={**CONFIG, **settings})


def test_every_answer_says_how_it_was_found_out_and_what_follows() -> None:
    powers = powers_of(FACTS)
    assert len({p.power for p in powers}) == len(powers) == 9
    assert all(p.found and p.then for p in powers)
    assert powers[0].found == "version 22.05.8, cluster lab"


def test_a_slurm_that_is_not_there_and_one_that_does_not_answer_are_two_things() -> None:
    absent = replace(FACTS, config=None, trouble="salloc, srun not on the PATH")
    away = replace(FACTS, config=None, trouble="scontrol has not answered for 20 s")
    assert [p.granted for p in powers_of(absent)] == [Granted.NO]
    assert [p.granted for p in powers_of(away)] == [Granted.UNKNOWN]


@pytest.mark.parametrize(
    ("facts", "granted"),
    [
        (FACTS, "no"),
        (replace(FACTS, is_root=True), "yes"),
        (replace(FACTS, user="slurm"), "yes"),
        (replace(FACTS, admin_level="Operator"), "yes"),
        (replace(FACTS, admin_level="None"), "no"),
        (replace(FACTS, admin_level=None), "unknown"),
    ],
)
def test_who_may_drain_a_node(facts: SlurmFacts, granted: str) -> None:
    assert power("drain a node", facts).granted == granted


@pytest.mark.parametrize(
    ("facts", "granted"),
    [
        (FACTS, "yes"),
        (replace(FACTS, partition={**PARTITION, "AllocNodes": "login[1-2]"}), "no"),
        (replace(FACTS, partition=None), "unknown"),
        (configured(JobSubmitPlugins="lua"), "unknown"),
    ],
)
def test_whether_a_job_may_ask_for_nodes(facts: SlurmFacts, granted: str) -> None:
    assert power("salloc from a job", facts).granted == granted


def test_a_robot_of_the_site_is_seen() -> None:
    name = "a robot of the site checks nodes"
    assert power(name, FACTS).granted == Granted.NO
    found = power(name, configured(HealthCheckProgram="/usr/sbin/nhc"))
    assert (found.granted, found.found) == (Granted.YES, "HealthCheckProgram=/usr/sbin/nhc")
    hidden = {key: value for key, value in CONFIG.items() if key != "HealthCheckProgram"}
    assert power(name, replace(FACTS, config=hidden)).granted == Granted.UNKNOWN


def test_a_node_that_is_never_called_down_is_no_power() -> None:
    name = "a node that is silent is called down"
    assert power(name, FACTS).found == "SlurmdTimeout=10 sec"
    assert power(name, configured(SlurmdTimeout="0 sec")).granted == Granted.NO
