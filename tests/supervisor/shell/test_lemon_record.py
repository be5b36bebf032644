"""The record that all runs of a site share: several write at once, any may die at any moment, and
what somebody else has left in the folder keeps no run from beginning."""

import os
import threading
from pathlib import Path

import pytest
from opt_logbook.record.hardware import Offence
from opt_logbook.record.run_directory import RunDirectory

from opt_train.config.run_config import RunConfig
from opt_train.supervisor.config import SupervisorConfig
from opt_train.supervisor.shell.lemon_record import FILE_BYTES_MAX, LemonRecord, lemon_folder

OURS = Offence(1.8e9, "night", "n1", "gpu_ecc", "uncontained", "GPU-a")
THEIRS = Offence(1.7e9, "day", "n2", "node_failure")


def test_a_run_reads_what_others_wrote_and_not_its_own(tmp_path: Path) -> None:
    record = LemonRecord(tmp_path / "lemons")
    assert record.read_others("night", 5.0) == ()
    record.write("night", 5.0, (OURS,))
    record.write("day", 3.0, (THEIRS,))
    assert record.read_others("night", 5.0) == (THEIRS,)
    assert record.read_others("day", 3.0) == (OURS,)
    assert record.read_others("third", 9.0) == (THEIRS, OURS), "the oldest first"


def test_a_run_that_writes_again_counts_once(tmp_path: Path) -> None:
    """As a supervisor that comes back does."""
    record = LemonRecord(tmp_path)
    record.write("night", 5.0, (OURS,))
    record.write("night", 5.0, (OURS, THEIRS))
    assert record.read_others("", 0.0) == (THEIRS, OURS)


def test_a_run_begun_anew_under_its_name_forgets_nothing(tmp_path: Path) -> None:
    record = LemonRecord(tmp_path)
    record.write("night", 5.0, (OURS,))
    record.write("night", 6.0, (THEIRS,))
    assert record.read_others("night", 6.0) == (OURS,)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'[{"time": 1',
        b"{}",
        b'[{"time": "now", "run": "a", "node": "n", "cause": "c", "detail": "", "gpu": ""}]',
        b'[{"time": NaN, "run": "a", "node": "n", "cause": "c", "detail": "", "gpu": ""}]',
        b'[{"time": 1, "run": "'
        + b"a" * 300
        + b'", "node": "n", "cause": "c", "detail": "", "gpu": ""}]',
        b'[{"time": 1, "run": "a", "node": 7, "cause": "c", "detail": "", "gpu": ""}]',
        b"[" * 100_000,
        b" " * (FILE_BYTES_MAX + 1),
        b"\xff\xfe",
    ],
    ids=[
        "empty",
        "torn",
        "no list",
        "text",
        "NaN",
        "long text",
        "a number",
        "deep",
        "long",
        "no UTF-8",
    ],
)
def test_what_is_no_record_is_left_out(tmp_path: Path, content: bytes) -> None:
    record = LemonRecord(tmp_path)
    record.write("day", 3.0, (THEIRS,))
    (tmp_path / "bad-1.json").write_bytes(content)
    assert record.read_others("", 0.0) == (THEIRS,)


def test_neither_a_fifo_nor_a_link_nor_a_partial_file_is_read(tmp_path: Path) -> None:
    record = LemonRecord(tmp_path / "lemons")
    record.write("day", 3.0, (THEIRS,))
    elsewhere = tmp_path / "elsewhere.json"
    elsewhere.write_bytes((tmp_path / "lemons" / "day-3000.json").read_bytes())
    (tmp_path / "lemons" / "link.json").symlink_to(elsewhere)
    (tmp_path / "lemons" / ".night-5000.json.7.new.json").write_bytes(b"[")
    os.mkfifo(tmp_path / "lemons" / "fifo.json")
    assert record.read_others("", 0.0) == (THEIRS,)


def test_many_supervisors_write_at_once_and_none_sees_half_a_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = LemonRecord(tmp_path)

    def write(number: int) -> None:
        for count in range(20):
            record.write(f"run{number}", float(number), (OURS,) * (1 + count))

    writers = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        record.read_others("", 0.0)
    assert len(record.read_others("", 0.0)) == 80
    assert "is no record" not in caplog.text


def test_it_lies_beside_the_run_directories_or_where_the_user_says(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "runs" / "night")
    assert lemon_folder(RunConfig(), run) == tmp_path / "runs" / ".lemons"
    named = RunConfig(supervisor=SupervisorConfig(lemons="/site/lemons"))
    assert lemon_folder(named, run) == Path("/site/lemons")
