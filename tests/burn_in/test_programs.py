"""Each instrument by itself: one that hangs, dies or prints nonsense must not keep the others from
being reported, and must be named."""

import sys
import time
from pathlib import Path

import pytest
import torch

from opt_train.burn_in import device
from opt_train.burn_in.device import device_of_slot
from opt_train.burn_in.node import REPORT_SECONDS, Instrument, measure
from opt_train.burn_in.pair import fabric_of, meeting_of
from opt_train.burn_in.results import BurnInResult, BurnInTest, results_of, to_line
from opt_train.burn_in.storage import storage
from opt_train.diagnosis.causes import Cause
from opt_train.host import gpu_files


def python(program: str) -> Instrument:
    return Instrument((sys.executable, "-c", program), BurnInTest.MATMUL, "slot 0", Cause.GPU_FAULT)


def test_one_that_hangs_is_killed_and_the_others_are_reported() -> None:
    line = to_line([BurnInResult(BurnInTest.DISK, "/tmp", value=1.0)])
    hangs = python("import signal, time\nsignal.signal(15, signal.SIG_IGN)\ntime.sleep(100)")
    began = time.monotonic()
    found = list(measure([hangs, python(f"print({line!r})")], REPORT_SECONDS + 1.0))
    assert time.monotonic() - began < 5.0
    assert [(r.test, bool(r.trouble), r.cause) for r in found] == [
        ("matmul", True, "gpu_fault"),
        ("disk", False, ""),
    ]
    assert "has not ended within" in found[0].trouble


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import os; os.abort()", "SIGABRT"),
        ("raise RuntimeError('CUDA error: uncorrectable')", "CUDA error: uncorrectable"),
        ("print('hello')", "it printed no results"),
    ],
)
def test_how_one_ended_is_a_result(program: str, said: str) -> None:
    [result] = measure([python(program)], 60.0)
    assert said in result.trouble


def test_results_are_found_among_what_libraries_print() -> None:
    result = BurnInResult(BurnInTest.PAIR, "with n2", value=1e9, unit="B/s")
    output = (
        f"n1:7 NCCL INFO Using network IB\n{to_line([result])}\nn1:7 NCCL INFO comm destroyed\n"
    )
    assert results_of(output) == (result,)
    assert fabric_of(output) == "IB"
    assert fabric_of("") == ""


def test_a_meeting_is_as_good_as_its_worst_rank() -> None:
    well, slow = (BurnInResult(BurnInTest.PAIR, value=value) for value in (2.0, 1.0))
    broken = BurnInResult(BurnInTest.PAIR, trouble="reset")
    assert meeting_of([well, slow], "n2").value == 1.0
    assert meeting_of([well, broken, slow], "n2").trouble == "reset"


def test_a_node_whose_driver_is_broken_is_not_tested_by_its_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(gpu_files, "DEVICES", tmp_path)
    assert device_of_slot("auto", 0) == torch.device("cpu")
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / name).touch()
    assert device_of_slot("auto", 0) is None
    assert device_of_slot("cpu", 0) == torch.device("cpu"), "who asks for the CPU gets it"


@pytest.mark.parametrize("flip", [0, 1])
def test_memory_that_reads_back_wrong_is_counted(
    flip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill = device._fill

    def fill_and_flip(block: torch.Tensor, pattern: int | None, number: int) -> None:
        fill(block, pattern, number)
        block[5] ^= flip

    monkeypatch.setattr(device, "_fill", fill_and_flip)
    cpu = torch.device("cpu")
    result = device.memory(BurnInTest.HOST_MEMORY, cpu, "slot 0", 80_000)
    wrong = flip * (len(device.PATTERNS) + 1)
    assert result.trouble == (f"{wrong} words do not read back as they were written" * flip)
    assert result.cause == "silent_corruption" * flip


def test_a_disk_is_written_and_read_and_left_clean(tmp_path: Path) -> None:
    result = storage(BurnInTest.DISK, tmp_path / "file", 9_000_001)
    assert (result.trouble, result.unit) == ("", "B/s")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("test", "detail"), [(BurnInTest.DISK, "node_disk"), (BurnInTest.SHARED, "")]
)
def test_a_file_system_that_is_not_there_is_storage(
    test: BurnInTest, detail: str, tmp_path: Path
) -> None:
    result = storage(test, tmp_path / "absent" / "file", 1000)
    assert (result.cause, result.detail) == ("storage", detail)
    assert "No such file or directory" in result.trouble
