"""A rank on the wrong socket is slower on each step, and nothing says why."""

import asyncio
import os
from pathlib import Path

import pytest
from opt_logbook.record.run_directory import RunDirectory

from opt_train.agent.core_binding import (
    cores_of_slots,
    format_cores,
    gpus_of,
    gpus_of_slots,
    parse_cores,
)
from opt_train.agent.rank_log import LogCopies
from opt_train.agent.rank_slot import RankSlot
from opt_train.clusters.config import ClusterConfig
from tests.agent.harness import make_starter
from tests.agent.snapshots.stores import play

CORES = frozenset(range(16))
SOCKETS = (frozenset({0, 1, 2, 3, 8, 9, 10, 11}), frozenset({4, 5, 6, 7, 12, 13, 14, 15}))


class System:
    """A /sys of two sockets of four cores with two threads each, as a kernel writes it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        for core in CORES:
            topology = folder / f"devices/system/cpu/cpu{core}/topology"
            topology.mkdir(parents=True)
            (topology / "thread_siblings_list").write_text(f"{core % 8},{core % 8 + 8}\n")
        for node, cores in enumerate(("0-3,8-11", "4-7,12-15")):
            (folder / f"devices/system/node/node{node}").mkdir(parents=True)
            (folder / f"devices/system/node/node{node}/cpulist").write_text(f"{cores}\n")
        self.add("0000:00:02.0", vendor="0x1af4", kind="0x020000", numa_node="0")

    def add(self, address: str, *, vendor: str, kind: str, **files: str) -> None:
        device = self.path / "bus/pci/devices" / address
        device.mkdir(parents=True)
        for name, text in {"vendor": vendor, "class": kind, **files}.items():
            (device / name).write_text(f"{text}\n")

    def add_gpu(self, address: str, **files: str) -> None:
        self.add(address, vendor="0x10de", kind="0x030200", **files)


@pytest.fixture
def system(tmp_path: Path) -> System:
    return System(tmp_path / "sys")


@pytest.fixture
def four_gpus(system: System) -> System:
    """Two on each socket; the first by address is on the second socket, as on many boards."""
    system.add_gpu("0000:07:00.0", numa_node="1", local_cpulist="4-7,12-15")
    system.add_gpu("0000:0b:00.0", numa_node="1", local_cpulist="4-7,12-15")
    system.add_gpu("0000:48:00.0", numa_node="0", local_cpulist="0-3,8-11")
    system.add_gpu("0000:4c:00.0", numa_node="0")  # an older kernel
    # The GPUs' bridge is NVIDIA's too, and no GPU.
    system.add("0000:4d:00.0", vendor="0x10de", kind="0x068000", numa_node="0")
    return system


def test_each_rank_has_whole_cores_beside_its_gpu(four_gpus: System) -> None:
    bound = cores_of_slots(4, CORES, "0,1,2,3", four_gpus.path)
    assert [format_cores(cores) for cores in bound] == [
        "4-5,12-13",
        "6-7,14-15",
        "0-1,8-9",
        "2-3,10-11",
    ]
    assert cores_of_slots(4, CORES, None, four_gpus.path) == bound


def test_the_gpu_of_a_slot_is_the_one_that_cuda_gives_it(four_gpus: System) -> None:
    devices = gpus_of(four_gpus.path)
    assert gpus_of_slots(2, "2,0", devices) == ["0000:48:00.0", "0000:07:00.0"]
    # Alone on its socket, a rank has all of it.
    assert cores_of_slots(2, CORES, "2,0", four_gpus.path) == [SOCKETS[0], SOCKETS[1]]


def test_cores_that_are_not_ours_are_left_alone(four_gpus: System) -> None:
    bound = cores_of_slots(2, {4, 5, 6, 7, 0}, "0,1", four_gpus.path)
    assert bound == [frozenset({4, 5}), frozenset({6, 7})]


def test_what_is_not_known_binds_nothing(four_gpus: System, system: System) -> None:
    for visible in ("GPU-5f8d,GPU-11", "MIG-1,MIG-2", "9,", ""):
        assert cores_of_slots(2, CORES, visible, four_gpus.path) == [frozenset()] * 2
    system.add_gpu("0000:99:00.0", numa_node="-1", local_cpulist="")
    assert cores_of_slots(1, CORES, "4", system.path) == [frozenset()]


def test_without_gpus_the_cores_are_divided(system: System) -> None:
    bound = cores_of_slots(3, CORES, None, system.path)
    assert [format_cores(cores) for cores in bound] == ["0-1,8-9", "2-4,10-12", "5-7,13-15"]
    # More ranks than cores: all on all, which the kernel divides better than a list would.
    assert cores_of_slots(9, CORES, None, system.path) == [CORES] * 9


def test_a_machine_that_says_nothing_divides_its_cores(tmp_path: Path) -> None:
    assert cores_of_slots(2, {0, 1, 2}, None, tmp_path) == [frozenset({0}), frozenset({1, 2})]


@pytest.mark.parametrize("text", ["0-3,8-11", "5", "0,2,4-6"])
def test_a_list_of_cores_is_read_and_written_as_the_kernel_does(text: str) -> None:
    assert format_cores(parse_cores(text)) == text


@pytest.mark.parametrize("text", ["", "none", "3-", "-1"])
def test_no_list_of_cores_is_none(text: str) -> None:
    assert parse_cores(text) == frozenset()


def test_nodes_that_share_a_machine_bind_nothing() -> None:
    assert not ClusterConfig(kind="local").binds_ranks
    assert ClusterConfig(kind="slurm").binds_ranks
    assert not ClusterConfig(kind="slurm", bind_ranks=False).binds_ranks


def test_a_rank_and_its_threads_run_on_its_cores(run: RunDirectory) -> None:
    core = max(os.sched_getaffinity(0))

    async def scene() -> None:
        starter = make_starter(run, "odd_rank", ODD_RANK="threads")
        slot = RankSlot(
            0,
            starter,
            run,
            run.logs / "warm" / "node-1",
            LogCopies(run),
            cores={core},
            add_fact=lambda _: None,
            add_metrics=lambda _: None,
            keep_snapshot=lambda *_: None,
            changed=lambda: None,
        )
        slot.open()
        while not (pid := slot.state().pid):
            await asyncio.sleep(0.01)
        tasks = Path(f"/proc/{pid}/task")
        while len(list(tasks.iterdir())) < 2:
            await asyncio.sleep(0.01)
        for task in tasks.iterdir():
            assert os.sched_getaffinity(int(task.name)) == {core}
        await slot.close()
        await starter.close()

    play(scene(), seconds=20.0)
