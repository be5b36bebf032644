"""Cases with a known root cause: the loudest line must not win over it, nor hardware be blamed for
a user's bug."""

from typing import Any

import pytest
from opt_logbook.record.events import FailureSeen

from opt_train.diagnosis.verdict import Case, Diagnosis, diagnose
from opt_train.protocol.facts import ExitNotice, LogLine, RankExited, Stacks

TRACEBACK = "Traceback (most recent call last):"
PEER = (
    "RuntimeError: [third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer "
    "[127.0.0.1]:4242"
)
WATCHDOG = (
    "[rank3]:[E ProcessGroupNCCL.cpp:616] Watchdog caught collective operation timeout: "
    "WorkNCCL(SeqNum=12)"
)


def ended(
    rank: int,
    *lines: str,
    code: int | None = 1,
    signal: int | None = None,
    by_agent: bool = False,
    leaving: ExitNotice | None = None,
) -> RankExited:
    code = None if signal is not None else code
    tail = tuple(
        LogLine(f"logs/1.00/n{rank}/rank{rank}.log", number, text)
        for number, text in enumerate(lines, 40)
    )
    return RankExited(1, rank, 0, 100 + rank, code, signal, by_agent, leaving, "step", 7, tail)


def verdict(*exits: RankExited, sign: str = "exit", rank: int = 0, **known: object) -> Diagnosis:
    known = {"exit_notices": {}, "stacks": {}, "down": {}, **known}
    table = {exited.rank: (f"n{exited.rank}", exited) for exited in exits}
    case: Any = Case  # with `known` as a test's shorthand
    first = FailureSeen(1, 1, f"n{rank}", rank, "what was seen", sign)
    return diagnose(case(first, table, **known))


@pytest.mark.parametrize(
    ("cause", "detail", "line"),
    [
        ("gpu_ecc", "uncontained", "RuntimeError: CUDA error: uncorrectable ECC error encountered"),
        ("gpu_ecc", "contained", "NVRM: Xid (PCI:0000:0f:00): 94, pid=1, Contained memory error"),
        (
            "gpu_ecc",
            "remap_pending",
            "NVRM: Xid (PCI:0000:0f:00): 63, Row Remapper: New row marked for remapping",
        ),
        ("gpu_ecc", "remap_failed", "NVRM: Xid (PCI:0000:0f:00): 64, Row Remapper failure"),
        (
            "gpu_lost",
            "the GPU fell off the bus",
            "NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus.",
        ),
        (
            "gpu_fault",
            "the GPU's driver or firmware stopped",
            "NVRM: Xid (PCI:0000:3b:00): 119, Timeout after 6s",
        ),
        (
            "gpu_oom",
            "out of GPU memory",
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
        ),
        (
            "illegal_access",
            "an illegal memory access in a kernel",
            "CUDA error: an illegal memory access was hit",
        ),
        ("host_oom", "an allocation on the host failed", "MemoryError"),
        (
            "host_oom",
            "the kernel's out-of-memory killer",
            "oom-kill:constraint=CONSTRAINT_MEMCG,task=python,pid=100",
        ),
        ("storage", "no space left", "OSError: [Errno 28] No space left on device: '/data'"),
        ("storage", "a stale file handle", "OSError: [Errno 116] Stale file handle"),
        ("storage", "the file system answers with errors", "OSError: [Errno 5] Input/output error"),
        ("user_code", "ZeroDivisionError", "ZeroDivisionError: division by zero"),
        ("user_code", "my.module.StrangeError", "[rank0]: my.module.StrangeError: no"),
    ],
)
def test_one_rank_shows_the_cause_and_the_others_are_victims(
    cause: str, detail: str, line: str
) -> None:
    """Seven ranks that lost a peer are louder than the one that tells why."""
    victims = [ended(rank, TRACEBACK, PEER) for rank in range(3)]
    found = verdict(*victims, ended(3, TRACEBACK, line))
    assert (found.cause, found.detail, found.node, found.rank) == (cause, detail, "n3", 3)
    assert found.evidence[0].text == line
    assert found.evidence[0].file == "logs/1.00/n3/rank3.log"
    assert found.evidence[0].line == 41


def test_a_users_bug_is_never_hardwares_fault() -> None:
    found = verdict(ended(0, TRACEBACK, 'KeyError: "gpu"'), ended(1, TRACEBACK, PEER))
    assert (found.cause, found.blame) == ("user_code", "software")


def test_a_plain_sigkill_is_killed_and_one_with_a_kernel_line_is_host_oom() -> None:
    assert verdict(ended(0, signal=9)).cause == "killed"
    assert (
        verdict(ended(0, "Out of memory: Killed process 100 (python)", signal=9)).cause
        == "host_oom"
    )


def test_a_node_that_is_down_explains_its_peers_complaints() -> None:
    found = verdict(ended(1, TRACEBACK, PEER), sign="down", down={"n0": "no heartbeat"})
    assert (found.cause, found.node, found.detail) == ("node_failure", "n0", "no heartbeat")
    assert [e.text for e in found.evidence] == ["cluster: n0 is down: no heartbeat", PEER]


def test_a_full_disk_that_training_survived_does_not_explain_a_dead_node() -> None:
    """A line in the log of a rank that was alive until it was killed did not end it."""
    survivor = ended(1, "No space left on device: save abandoned", signal=9, by_agent=True)
    assert verdict(survivor, sign="down", down={"n0": "gone"}).cause == "node_failure"
    assert verdict(survivor, ended(0, signal=9)).cause == "killed"


def test_the_reason_that_a_rank_gives_is_believed_only_with_its_exit_code() -> None:
    """Python itself exits 2 for a missing file, and anything may exit 78."""
    notice = ExitNotice(78, 0, "model.heads=5 must divide 768")
    found = verdict(ended(0, code=78, leaving=notice))
    assert (found.cause, found.detail) == ("config", "model.heads=5 must divide 768")
    assert verdict(ended(0, code=78)).cause == "unknown"
    assert (
        verdict(ended(0, code=1, leaving=ExitNotice(1, 3, "shard 4 is short", cause="data"))).cause
        == "data"
    )


def test_only_victims_means_the_network_or_a_collective() -> None:
    assert verdict(ended(0, TRACEBACK, PEER), ended(1, TRACEBACK, PEER)).cause == "network"
    assert (
        verdict(ended(0, WATCHDOG, signal=6), ended(1, WATCHDOG, signal=6)).cause
        == "collective_timeout"
    )


def test_a_hang_is_a_hang_when_everyone_was_killed_for_it() -> None:
    exits = [ended(rank, signal=9, by_agent=True) for rank in range(2)]
    stacks = {1: ("n1", Stacks(1, 1, False, "T"))}
    found = verdict(*exits, sign="hang", rank=1, stacks=stacks)
    detail = "stopped moving in phase step; its process was stopped"
    assert (found.cause, found.detail, found.rank) == ("hang", detail, 1)


def test_a_silent_crash_is_unknown_and_says_how_it_ended() -> None:
    found = verdict(ended(0, signal=11))
    assert (found.cause, found.detail) == ("unknown", "ended with SIGSEGV")
    assert "phase step" in found.evidence[0].text


def test_of_two_that_say_the_same_the_first_seen_is_named() -> None:
    assert verdict(ended(0, signal=9), ended(1, signal=9), rank=1).rank == 1


def test_the_end_of_a_traceback_is_enough() -> None:
    """A log's tail holds so many lines; a deep traceback's first one is not among them."""
    tail = (
        '  File "/run/code/loop.py", line 57, in save',
        "       ~~~~~^^^^^^^^",
        "KeyError: 'step'",
        "WARNING: done",
    )
    found = verdict(ended(0, *tail))
    assert (found.cause, found.detail) == ("user_code", "KeyError")
    assert verdict(ended(0, "INFO: no traceback here", "Config: fine")).cause == "unknown"
