"""An agent tests its node in a child that it can end at any moment: ranks must never wait for a
test, and what a test found must reach the supervisor as findings."""

import asyncio
import contextlib
import json
import sys
import time
from pathlib import Path

from opt_logbook.record.run_directory import RunDirectory

from opt_train.agent.preflight import NodePreflight, findings_of
from opt_train.burn_in.results import BurnInResult, BurnInTest, NodeReport, report_line
from opt_train.host.processes import mark_of, marked
from opt_train.protocol.commands import Preflight
from opt_train.protocol.facts import NodeFinding, PreflightEnded
from opt_train.protocol.framing import Message
from tests.agent.harness import SupervisorEnd, begin, leave, play, start_agent

WELL = BurnInResult(BurnInTest.MATMUL, "slot 0", value=1.0)
CORRUPT = BurnInResult(BurnInTest.MATMUL, "slot 1", trouble="1 of 9", cause="silent_corruption")
FULL = BurnInResult(
    BurnInTest.DISK, "/tmp", trouble="/tmp: full", cause="storage", detail="node_disk"
)
SHARED = BurnInResult(BurnInTest.SHARED, "/runs", trouble="/runs: full", cause="storage")
ODD = BurnInResult(BurnInTest.PROGRAM, trouble="odd")


def report(*results: BurnInResult) -> NodeReport:
    return NodeReport("n1", 0.0, results)


def test_each_failed_test_is_a_finding_and_a_shared_file_system_is_no_lasting_one() -> None:
    found = list(findings_of(report(WELL, CORRUPT, FULL, SHARED, ODD)))
    assert [(f.cause, f.detail, f.permanent) for f in found] == [
        ("silent_corruption", "preflight: matmul", True),
        ("storage", "node_disk", True),
        ("storage", "preflight: shared file system", False),
        ("unknown", "preflight: program", True),
    ]
    assert found[0].evidence[0].text == "1 of 9"


async def published_by(program: str, seconds: float, stop_at: Path | None = None) -> list[Message]:
    """What is published of `program`, which is stopped once `stop_at` is there."""
    published: list[Message] = []
    tasks: list[asyncio.Task[None]] = []
    preflight = NodePreflight(
        [sys.executable, "-c", program],
        seconds,
        published.append,
        lambda work: tasks.append(asyncio.create_task(work)),
    )
    preflight.begin()
    preflight.begin()  # a command that came twice
    while stop_at is not None and not stop_at.exists():
        await asyncio.sleep(0.01)
    if stop_at is not None:
        preflight.stop("ranks begin here")
    await asyncio.gather(*tasks)
    assert len(tasks) == 1
    return published


def test_findings_come_before_the_answer() -> None:
    line = report_line(report(WELL, CORRUPT))
    published = asyncio.run(published_by(f"print('noise')\nprint({line!r})", 60.0))
    assert isinstance(published[0], NodeFinding)
    assert isinstance(published[1], PreflightEnded)
    assert (published[1].tests, published[1].failed, published[1].why) == (2, 1, "")


def test_a_test_is_killed_at_once_for_ranks_and_reports_nothing(tmp_path: Path) -> None:
    started = tmp_path / "started"
    # Its instrument is in another process group, as those of the real program are.
    program = (
        "import os, pathlib, sys, time\n"
        "from opt_train.host.children import KillableChild\n"
        "child = KillableChild([sys.executable, '-c', 'import time; time.sleep(100)'])\n"
        f"pathlib.Path({str(started)!r} + '.part').write_text(str(child.pid))\n"
        f"os.rename({str(started)!r} + '.part', {str(started)!r})\n"
        "time.sleep(100)\n"
    )
    began = time.monotonic()
    [ended] = asyncio.run(published_by(program, 60.0, stop_at=started))
    assert time.monotonic() - began < 30.0
    assert isinstance(ended, PreflightEnded)
    assert (ended.tests, ended.why) == (0, "ranks begin here")
    instrument = int(started.read_text())
    deadline = time.monotonic() + 5.0
    while _lives(instrument) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _lives(instrument), "the instrument outlived its program"


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_program_that_fails_is_answered_too() -> None:
    [ended] = asyncio.run(published_by("raise SystemExit(3)", 60.0))
    assert isinstance(ended, PreflightEnded)
    assert "ended with code 3" in ended.why


# A real agent ------------------------------------------------------------------------------------


def programs_of(run: RunDirectory) -> list[str]:
    """Test programs that run on the node, by the modules that they are."""
    found = []
    for pid in marked(mark_of(run.path, "node-1")):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            found += [word for word in words if word.startswith("opt_train.burn_in.")]
    return found


def test_ranks_begin_on_a_node_that_is_being_tested_and_end_its_test(run: RunDirectory) -> None:
    config = json.loads(run.config_json.read_text())
    run.config_json.write_text(json.dumps(config | {"burn_in": {"matmul_seconds": 100.0}}))

    async def scene() -> None:
        agent = start_agent(run)
        async with SupervisorEnd(run) as listener:
            await listener.connected()
            await listener.until(lambda: (s := listener.slot()) and s.stage == "warm")
            listener.server.send("node-1", Preflight())
            await listener.until(lambda: "opt_train.burn_in.device" in programs_of(run))
            listener.server.send("node-1", begin(run, steps=1000))
            ended = await listener.fact(PreflightEnded)
            assert (ended.tests, ended.why) == (0, "ranks begin here")
            await listener.until(lambda: (s := listener.slot()) and s.step > 2)
            await listener.until(lambda: programs_of(run) == [])
            assert listener.facts(NodeFinding) == []
            # A command that was on its way is answered, and disturbs nobody.
            listener.server.send("node-1", Preflight())
            await listener.until(lambda: len(listener.facts(PreflightEnded)) == 2)
            assert listener.facts(PreflightEnded)[1].why == "ranks run here"
            assert programs_of(run) == []
            await leave(listener, agent)

    play(scene())
