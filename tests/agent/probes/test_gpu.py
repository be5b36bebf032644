"""The probe of the GPUs: what changes of a reading are findings, and the real binding over a
stand-in for NVIDIA's library."""

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from opt_train.agent.probes import gpu
from opt_train.agent.probes.gpu import (
    GpuProbe,
    GpuReading,
    GpuState,
    carried_over,
    findings_between,
)
from opt_train.protocol.facts import GpusSeen, NodeFinding, NodeGpu
from tests.slurm import fake_nvml

HEALTHY = GpuState(0, "GPU-a", ecc_uncorrected=3, remap_pending=False, remap_failed=False)


def changed(**fields: object) -> GpuReading:
    known = {name: getattr(HEALTHY, name) for name in GpuState.__slots__}
    return GpuReading((GpuState(**{**known, **fields}),))


@pytest.mark.parametrize(
    ("now", "found"),
    [
        (GpuReading((HEALTHY,)), []),
        (changed(ecc_uncorrected=4), [("gpu_ecc", "uncontained", True)]),
        # A reset of the GPU begins its volatile counters anew.
        (changed(ecc_uncorrected=0), []),
        (changed(ecc_uncorrected=None), []),
        (changed(remap_pending=True), [("gpu_ecc", "remap_pending", True)]),
        (changed(remap_failed=True), [("gpu_ecc", "remap_failed", True)]),
        (changed(lost=True), [("gpu_lost", "lost", True)]),
        (GpuReading((HEALTHY,), ((0, 95),)), [("gpu_ecc", "uncontained", True)]),
        (GpuReading((HEALTHY,), ((0, 79),)), [("gpu_lost", "fallen off the bus", True)]),
        # The Xid says that it was contained: the counter that moves with it says nothing more.
        (
            GpuReading(changed(ecc_uncorrected=4).gpus, ((0, 94),)),
            [("gpu_ecc", "contained", False)],
        ),
        # 45 is the end of a process that something else has ended; 13 is a bug of a kernel.
        (GpuReading((HEALTHY,), ((0, 45), (0, 13))), []),
    ],
)
def test_what_changes_is_found(now: GpuReading, found: list[tuple[str, str, bool]]) -> None:
    findings = list(findings_between(GpuReading((HEALTHY,)), now))
    assert [(f.cause, f.detail, f.permanent) for f in findings] == found
    assert all("GPU 0 (GPU-a)" in f.evidence[0].text for f in findings)


def test_what_was_there_before_the_agent_is_no_news_but_for_conditions() -> None:
    first = changed(ecc_uncorrected=7, remap_pending=True)
    assert [f.detail for f in findings_between(None, first)] == ["remap_pending"]


def test_a_lost_gpu_keeps_its_name_and_its_counters() -> None:
    kept = carried_over(GpuReading((HEALTHY,)), GpuReading((GpuState(0, lost=True),)))
    assert kept.gpus[0] == GpuState(0, "GPU-a", 3, False, False, lost=True)


class Library:
    """The stand-in, whose answers the test sets."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.disk = folder / "disk"
        self.disk.mkdir()
        environment = fake_nvml.build(folder / "nvml")
        monkeypatch.setenv("LD_LIBRARY_PATH", environment["LD_LIBRARY_PATH"])
        monkeypatch.setenv("FAKE_NVML", str(self.disk / "fake_nvml"))

    def answers(self, **values: int) -> None:
        fake_nvml.set_values(self.disk, count=2, **values)


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    if shutil.which("gcc") is None:
        pytest.skip("the stand-in for NVML needs gcc: apt-get install gcc libc6-dev")
    monkeypatch.setattr(gpu, "READ_SECONDS", 0.1)
    monkeypatch.setattr(gpu, "AGAIN_SECONDS", 0.1)
    made = Library(tmp_path, monkeypatch)
    made.answers()
    return made


async def watch(
    until: Callable[[list[NodeFinding]], bool], change: Callable[[], None]
) -> list[GpusSeen]:
    """Run the probe; `change` once it has read, until `until` holds of the findings it published.
    Returns what it said of which GPUs there are."""
    published: list[NodeFinding] = []
    seen: list[GpusSeen] = []

    def publish(fact: NodeFinding | GpusSeen) -> None:
        if isinstance(fact, GpusSeen):
            seen.append(fact)
        else:
            published.append(fact)

    probe = GpuProbe(publish)
    running = asyncio.create_task(probe.run())
    try:
        async with asyncio.timeout(30):
            while probe.last is None:
                await asyncio.sleep(0.02)
            assert published == []
            change()
            while not until(published):
                await asyncio.sleep(0.02)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert seen[-1].gpus == probe.gpus
    return seen


def test_a_finding_says_which_board_it_is_and_its_counters_before_and_after(
    library: Library,
) -> None:
    found: list[NodeFinding] = []

    def until(published: list[NodeFinding]) -> bool:
        found[:] = published
        return bool(published)

    seen = asyncio.run(watch(until, lambda: library.answers(gpu1_ecc=2)))
    bad = NodeGpu(1, "GPU-fake-0001", "1322500000001", "00000000:3C:00.0")
    assert [fact.gpus for fact in seen] == [
        (NodeGpu(0, "GPU-fake-0000", "1322500000000", "00000000:3B:00.0"), bad)
    ]
    assert found[0].gpu == bad
    assert found[0].evidence[1].text == (
        "GPU 1, before -> after: uncorrectable ECC errors 0 -> 2, row waits to be remapped "
        "no -> no, row could not be remapped no -> no"
    )


def test_a_board_without_a_serial_number_is_known_by_the_rest(library: Library) -> None:
    library.answers(gpu0_no_serial=1)
    seen = asyncio.run(watch(bool, lambda: library.answers(gpu0_no_serial=1, gpu0_ecc=1)))
    assert seen[0].gpus[0] == NodeGpu(0, "GPU-fake-0000", "", "00000000:3B:00.0")


def test_an_ecc_error_is_read_through_nvidias_binding(library: Library) -> None:
    def found(published: list[NodeFinding]) -> bool:
        return [f.evidence[0].text for f in published] == [
            "GPU 1 (GPU-fake-0001): volatile uncorrectable ECC errors 0 -> 2"
        ]

    asyncio.run(watch(found, lambda: library.answers(gpu1_ecc=2)))


def test_a_signal_that_asks_to_stop_does_not_end_the_child(library: Library) -> None:
    """Schedulers send it to every process they find."""

    def change() -> None:
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                environment = (path / "environ").read_bytes().split(b"\0")
                ours = f"FAKE_NVML={library.disk / 'fake_nvml'}".encode() in environment
                if ours and b"opt_train.agent.probes.gpu" in (path / "cmdline").read_bytes():
                    os.kill(int(path.name), signal.SIGTERM)
                    hit.append(path.name)
        library.answers(gpu0_ecc=1)

    hit: list[str] = []
    asyncio.run(watch(lambda published: len(published) == 1, change))
    assert len(hit) == 1


def test_an_xid_event_is_heard(library: Library) -> None:
    asyncio.run(
        watch(
            lambda published: [(f.cause, f.detail) for f in published] == [("gpu_lost", XID_79)],
            lambda: fake_nvml.raise_xid(library.disk, 0, 79),
        )
    )


XID_79 = "fallen off the bus"


def test_a_lost_gpu_is_named(library: Library) -> None:
    asyncio.run(
        watch(
            lambda published: any("GPU-fake-0001" in f.evidence[0].text for f in published),
            lambda: library.answers(gpu1_lost=1),
        )
    )


def test_a_library_that_hangs_is_noted_and_asked_again(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "DEADLINE_SECONDS", 3.0)

    def found(published: list[NodeFinding]) -> bool:
        if [f.detail for f in published] == ["NVML hangs"]:
            library.answers(gpu0_remap_fail=1)  # it answers again
        return [f.detail for f in published] == ["NVML hangs", "remap_failed"]

    asyncio.run(watch(found, lambda: library.answers(gpu0_hang=1)))


def test_without_nvidias_library_there_is_nothing_to_watch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    published: list[NodeFinding | GpusSeen] = []
    asyncio.run(asyncio.wait_for(GpuProbe(published.append).run(), 30))
    assert published == []
