"""What a site's Slurm grants the user who asks: read from its configuration, changed nowhere.

A few of the questions could be tried out instead (drain a node, queue a job again), at the cost of
doing it to a cluster that others use. So they are answered by what Slurm says of itself, and where
something else may still refuse, such as a site's own submit plugin, the answer is unknown.
"""

import getpass
import os
from collections.abc import Mapping
from dataclasses import dataclass

from opt_train.burn_in.site_power import Granted, SitePower
from opt_train.clusters import slurm_commands as slurm

NOTHING = ("", "(null)", "None", "none")
ADMIN_LEVELS = ("Operator", "Administrator", "Admin")


@dataclass(frozen=True, slots=True)
class SlurmFacts:
    """What Slurm answered; None: it did not."""

    config: Mapping[str, str] | None
    """``scontrol show config``."""
    partition: Mapping[str, str] | None
    """``scontrol show partition``, of the one that the nodes come from."""
    admin_level: str | None
    """Of the user, by the accounting data base; empty: there is none."""
    user: str
    is_root: bool
    trouble: str = ""
    """Why there is no answer."""


def ask_slurm(partition: str) -> SlurmFacts:
    """Ask Slurm; `partition` empty: the default one."""
    is_root = os.getuid() == 0
    user = _user()
    absent = slurm.missing_programs()
    if absent:
        return SlurmFacts(None, None, None, user, is_root, f"{', '.join(absent)} not on the PATH")
    try:
        config = settings_of(slurm.ask("scontrol", "show", "config").splitlines())
    except slurm.SlurmError as error:
        return SlurmFacts(None, None, None, user, is_root, str(error))
    return SlurmFacts(config, _partition(partition), _admin_level(config, user), user, is_root)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user number without a name, as in many containers
        return str(os.getuid())


def settings_of(lines: list[str]) -> dict[str, str]:
    """``Key = value`` a line."""
    pairs = (line.partition("=") for line in lines if "=" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


def _partition(name: str) -> dict[str, str] | None:
    try:
        shown = slurm.ask("scontrol", "--oneliner", "show", "partition", *([name] if name else []))
    except slurm.SlurmError:
        return None
    each = [settings_of(line.split()) for line in shown.splitlines() if line.strip()]
    return next((p for p in each if name or p.get("Default") == "YES"), None)


def _admin_level(config: Mapping[str, str], user: str) -> str | None:
    # Without a data base sacctmgr fails, which would pass for no answer.
    if config.get("AccountingStorageType", "").partition("/")[2] in NOTHING:
        return ""
    try:
        return slurm.ask(
            *("sacctmgr", "--noheader", "--parsable2", "show", "user", user, "format=AdminLevel")
        ).strip()
    except slurm.SlurmError:
        return None


# The answers --------------------------------------------------------------------------------------


def powers_of(facts: SlurmFacts) -> list[SitePower]:
    """What `facts` say the site grants."""
    if facts.config is None:
        there = Granted.NO if "PATH" in facts.trouble else Granted.UNKNOWN
        return [SitePower("Slurm", there, facts.trouble, "cluster=local, on this machine alone")]
    config, partition = facts.config, facts.partition or {}
    return [
        SitePower(
            "Slurm",
            Granted.YES,
            f"version {config.get('SLURM_VERSION', '?')}, cluster {config.get('ClusterName', '?')}",
            "cluster=slurm",
        ),
        _drain(facts, config),
        _allocate(config, facts.partition),
        _grace(config, partition),
        _requeue(config),
        _number(
            config,
            "SlurmdTimeout",
            "a node that is silent is called down",
            "what has died without a word is taken out then; until then its silence is unknown",
        ),
        _robot(config, "HealthCheckProgram", "a robot of the site checks nodes"),
        _robot(config, "RebootProgram", "a robot of the site reboots nodes"),
        _robot(config, "SuspendProgram", "idle nodes are powered down"),
    ]


def _drain(facts: SlurmFacts, config: Mapping[str, str]) -> SitePower:
    power = "drain a node"
    ticket = "a ticket for each node that is taken out: opt-train tickets RUN"
    mine = f"{ticket}; drain it yourself by `scontrol update nodename=NODE state=drain reason=...`"
    if facts.is_root or config.get("SlurmUser", "").partition("(")[0] == facts.user:
        return SitePower(power, Granted.YES, f"{facts.user} is Slurm's own user or root", mine)
    if facts.admin_level is None:
        return SitePower(power, Granted.UNKNOWN, "sacctmgr does not answer", ticket)
    if facts.admin_level in ADMIN_LEVELS:
        return SitePower(power, Granted.YES, f"{facts.user} is {facts.admin_level}", mine)
    # Slurm gives this right by its data base alone.
    level = facts.admin_level or "no accounting data base, so no operators"
    return SitePower(power, Granted.NO, f"sacctmgr: {level}", ticket)


def _allocate(config: Mapping[str, str], partition: Mapping[str, str] | None) -> SitePower:
    power = "salloc from a job"
    outside = "the supervisor's job holds the nodes from outside: opt-train submit"
    if partition is None:
        found = "scontrol shows no such partition; set cluster.slurm.partition"
        return SitePower(power, Granted.UNKNOWN, found, outside)
    nodes = partition.get("AllocNodes", "")
    # A site's plugin looks at each request, and may refuse what the configuration allows.
    plugins = config.get("JobSubmitPlugins", "")
    if plugins not in NOTHING:
        found = f"JobSubmitPlugins={plugins} may refuse it"
        return SitePower(
            power, Granted.UNKNOWN, found, f"{outside}; if it is refused, cluster.slurm.holder=job"
        )
    if nodes == "ALL":
        return SitePower(power, Granted.YES, "AllocNodes=ALL, no submit plugin", outside)
    login = f"start `opt-train run` on one of {nodes}, or all in one job: cluster=slurm-inside"
    return SitePower(power, Granted.NO, f"AllocNodes={nodes}", login)


def _grace(config: Mapping[str, str], partition: Mapping[str, str]) -> SitePower:
    wait, grace = config.get("KillWait", ""), partition.get("GraceTime", "")
    then = (
        "agents and ranks are deaf to the TERM; a save is begun "
        "cluster.slurm.stop_before_seconds before the time limit"
    )
    if not wait:
        return SitePower("time between TERM and KILL", Granted.UNKNOWN, "KillWait not shown", then)
    found = f"KillWait={wait}" + (f", GraceTime={grace} s when preempted" if grace else "")
    return SitePower("time between TERM and KILL", Granted.YES, found, then)


def _requeue(config: Mapping[str, str]) -> SitePower:
    value = config.get("JobRequeue", "")
    power, found = "jobs are queued again", f"JobRequeue={value}"
    if value == "1":
        then = "the supervisor's job asks for it (--requeue) and adopts its ranks"
        return SitePower(power, Granted.YES, found, then)
    if value == "0":
        # Only the default: a job that asks for it may still be.
        then = "the supervisor's job asks for it by --requeue"
        return SitePower(power, Granted.YES, f"{found}, for jobs that ask", then)
    return SitePower(power, Granted.UNKNOWN, "JobRequeue not shown", "--requeue is asked for")


def _number(config: Mapping[str, str], key: str, power: str, then: str) -> SitePower:
    value = config.get(key, "")
    if not value:
        return SitePower(power, Granted.UNKNOWN, f"{key} not shown", then)
    # 0 turns it off, and is no time at all.
    if value.split()[0] == "0":
        return SitePower(power, Granted.NO, f"{key}={value}", then)
    return SitePower(power, Granted.YES, f"{key}={value}", then)


def _robot(config: Mapping[str, str], key: str, power: str) -> SitePower:
    value = config.get(key)
    acts = "a node that it drains is a planned replacement; one that it takes away is a dead node"
    if value is None:
        return SitePower(power, Granted.UNKNOWN, f"{key} not shown", acts)
    if value in NOTHING:
        return SitePower(power, Granted.NO, f"{key} is not set", "nothing is expected of it")
    return SitePower(power, Granted.YES, f"{key}={value}", acts)
