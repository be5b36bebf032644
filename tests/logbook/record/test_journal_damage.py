"""Whatever happens to the bytes of a journal is found, and found where it happened."""

from pathlib import Path

import pytest
from opt_logbook.record.chain import Reading, check, read_bytes
from opt_logbook.record.codec import GENESIS, encode
from opt_logbook.record.events import (
    CheckpointRetired,
    Entry,
    FailureSeen,
    JournalDamaged,
    JournalRepaired,
    Note,
)
from opt_logbook.record.journal import Journal, read
from opt_logbook.record.lock import Lock
from opt_logbook.record.run_directory import RunDirectory
from opt_logbook.record.verify import verify, verify_bytes


def fifty_lines() -> bytes:
    data, previous = b"", GENESIS
    for seq in range(1, 51):
        event = (
            Note("maria", f"line {seq}")
            if seq % 3
            else FailureSeen(seq, 1, "node-2", 1, 'said "hash":"x"}')
        )
        line = encode(Entry(1795356185.0 + seq, "1.00", seq, event), seq, previous)
        data, previous = data + line, line[-67:-3].decode()
    return data


FIFTY = fifty_lines()


def found_lines(data: bytes) -> list[int]:
    """Lines that are damaged or torn."""
    chain = check(data)
    return [damage.line for damage in chain.damaged] + (
        [len(chain.lines) + 1] if chain.torn_bytes else []
    )


def test_the_untouched_journal_verifies() -> None:
    reading = read_bytes(FIFTY)
    assert len(reading.entries) == 50
    assert not reading.damaged
    assert verify_bytes(FIFTY) == []


@pytest.mark.parametrize("mask", [0x01, 0x20, 0xFF])
def test_every_flipped_byte_is_found_at_its_line(mask: int) -> None:
    data = bytearray(FIFTY)
    line = 1
    for position, byte in enumerate(FIFTY):
        data[position] = byte ^ mask
        # A byte that becomes a line end splits its line in two: both pieces are that line.
        allowed = [line, line + 1] if data[position] == ord("\n") else [line]
        found = found_lines(bytes(data))
        assert found[:1] == [line], f"byte {position} of line {line}"
        assert set(found) <= set(allowed), f"byte {position} of line {line}"
        data[position] = byte
        line += byte == ord("\n")


@pytest.mark.parametrize("line", [1, 25, 50])
def test_a_byte_that_becomes_a_line_end_is_found_at_its_line(line: int) -> None:
    lines = FIFTY.splitlines(keepends=True)
    start = sum(map(len, lines[: line - 1]))
    for position in range(start, start + len(lines[line - 1]) - 1):
        found = found_lines(FIFTY[:position] + b"\n" + FIFTY[position + 1 :])
        assert found[0] == line
        assert set(found) <= {line, line + 1}


@pytest.mark.parametrize("line", [1, 2, 25, 49])
def test_a_line_that_is_missing_or_doubled_is_found(line: int) -> None:
    lines = FIFTY.splitlines(keepends=True)
    missing = b"".join(lines[: line - 1] + lines[line:])
    assert [finding.line for finding in verify_bytes(missing)] == [line]
    doubled = b"".join([*lines[:line], lines[line - 1], *lines[line:]])
    assert [finding.line for finding in verify_bytes(doubled)] == [line + 1]


def test_one_damaged_line_does_not_hide_the_others() -> None:
    lines = FIFTY.splitlines(keepends=True)
    lines[9] = lines[9].replace(b"node-2", b"node-3").replace(b"maria", b"mario")
    lines[29] = b"\x00" * 80 + b"\n"
    reading = read_bytes(b"".join(lines))
    # With line 30 its hash is gone too, so nothing vouches for line 31.
    assert [damage.line for damage in reading.damaged] == [10, 30, 31]
    assert [entry.seq for entry in reading.entries] == [
        n for n in range(1, 51) if n not in (10, 30, 31)
    ]


def test_a_last_line_cut_at_every_byte_is_torn_and_mended(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    start = FIFTY[:-1].rfind(b"\n") + 1
    with Lock.acquire(run) as lock:
        for end in range(start + 1, len(FIFTY)):
            run.journal.write_bytes(FIFTY[:end])
            with Journal.open(run, lock) as journal:
                assert journal.repairs == (JournalRepaired(end - start),)
                assert (len(journal.entries), journal.head.seq) == (49, 49)
                assert run.journal.read_bytes() == FIFTY[:start]
        run.journal.write_bytes(FIFTY[:-9])
        with Journal.open(run, lock) as journal:
            journal.append(Entry(1795356999.0, "", None, journal.repairs[0]))
    assert verify(run) == []


def test_a_last_line_of_zeros_after_a_power_loss_is_torn() -> None:
    reading = read_bytes(FIFTY + b"\x00" * 4096)
    assert (reading.torn_bytes, len(reading.entries), reading.damaged) == (4096, 50, ())


def test_a_damaged_line_stays_is_reported_once_and_the_journal_goes_on(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    spoilt = FIFTY.replace(b'"line 25"', b'"line 99"')
    run.journal.write_bytes(spoilt)
    for expected in (1, 0):
        with Lock.acquire(run) as lock, Journal.open(run, lock) as journal:
            assert len(journal.repairs) == expected
            for event in journal.repairs:
                assert isinstance(event, JournalDamaged)
                assert event.line == 25
                assert journal.append(Entry(1795356999.0, "", None, event)).seq == 51
    assert run.journal.read_bytes().startswith(spoilt)
    assert [(finding.file, finding.line) for finding in verify(run)] == [("journal.jsonl", 25)]


def test_appending_after_a_damaged_last_line_verifies(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for spoilt in (
        FIFTY.replace(b'"line 50"', b'"line 51"'),
        FIFTY[:-5] + b"0000\n",
        FIFTY[:-8] + b'zzzzz"}\n',
    ):
        run.journal.write_bytes(spoilt)
        with Lock.acquire(run) as lock, Journal.open(run, lock) as journal:
            assert journal.append(Entry(1795356999.0, "", None, Note("a", "b"))).seq in (50, 51)
        reading = read(run.journal)
        assert reading.entries[-1].event == Note("a", "b")


def test_a_cut_tail_is_found_by_the_head_the_metrics_and_the_manifests(demo: RunDirectory) -> None:
    assert verify(demo) == []
    whole = demo.journal.read_bytes()
    demo.journal.write_bytes(b"".join(whole.splitlines(keepends=True)[:8]))
    assert {finding.file for finding in verify(demo)} >= {
        "journal.head",
        "metrics/1.01.jsonl",
        "metrics/1.02.jsonl",
        "checkpoints/1.00/step-00000050/manifest.json",
    }
    # Whoever cuts the tail and mends the head is still found, also once the run has written on.
    with Lock.acquire(demo) as lock, Journal.open(demo, lock) as journal:
        assert any(
            isinstance(event, JournalDamaged) and "tail" in event.why for event in journal.repairs
        )
        for seq in range(50):
            journal.append(Entry(1795356999.0, "", None, Note("a", str(seq))))
    files = {finding.file for finding in verify(demo)}
    assert "journal.head" not in files
    assert files >= {"metrics/1.01.jsonl", "metrics/1.02.jsonl"}


def test_verify_names_what_is_missing_or_contradicts(demo: RunDirectory) -> None:
    (demo.path / "metrics/1.01.jsonl").unlink()
    with demo.metrics_of("1.00").open("a") as file:
        file.write('{"attempt":"1.00","step":3,"loss":0.0}\nno line\n{"torn')
    manifest = demo.path / "checkpoints/1.02/step-00000200/manifest.json"
    manifest.write_text("{}")
    (demo.path / "checkpoints/1.02/step-00000150/manifest.json").unlink()
    demo.head.unlink()
    assert {(finding.file, finding.what.split(",")[0]) for finding in verify(demo)} == {
        ("metrics/1.01.jsonl", "is missing"),
        ("metrics/1.00.jsonl", "contradicts an earlier line of step 3"),
        ("metrics/1.00.jsonl", "is no metrics line"),
        (
            "checkpoints/1.02/step-00000200/manifest.json",
            f"is not what journal line {committed(demo, 200)} committed",
        ),
        ("checkpoints/1.02/step-00000150/manifest.json", "is missing"),
        ("journal.head", "is missing"),
    }
    demo.journal.unlink()
    assert [str(finding) for finding in verify(demo)] == ["journal.jsonl: is missing"]


def test_a_checkpoint_that_goes_while_its_run_is_read_is_not_missing(
    demo: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = "checkpoints/1.02/step-00000150"

    def read_and_retire(path: Path) -> Reading:
        """What a live run does between the reading of its journal and that of its manifests."""
        monkeypatch.undo()
        reading = read(path)
        with Lock.acquire(demo) as lock, Journal.open(demo, lock) as journal:
            journal.append(Entry(1795356999.0, "1.02", 150, CheckpointRetired(gone)))
        (demo.path / gone / "manifest.json").unlink()
        return reading

    monkeypatch.setattr("opt_logbook.record.verify.read", read_and_retire)
    assert verify(demo) == []


def committed(run: RunDirectory, step: int) -> int:
    lines = run.journal.read_bytes().splitlines()
    return next(
        n
        for n, line in enumerate(lines, 1)
        if b"checkpoint_committed" in line and b'"step":%d,' % step in line
    )


def test_a_tail_that_was_told_gone_does_not_hide_damage_to_the_line_that_took_its_number(
    tmp_path: Path,
) -> None:
    run = RunDirectory(tmp_path)
    lines = FIFTY.splitlines(keepends=True)
    run.journal.write_bytes(b"".join(lines[:45]))
    run.head.write_text(f"50 {lines[49][-67:-3].decode()}\n")
    with Lock.acquire(run) as lock, Journal.open(run, lock) as journal:
        assert [(event.line, "tail" in event.why) for event in damage_in(journal)] == [(50, True)]
        journal.append(Entry(1795356999.0, "", None, journal.repairs[0]))
        for seq in range(47, 52):
            assert (
                journal.append(Entry(1795356999.0, "", None, Note("maria", f"again {seq}"))).seq
                == seq
            )
    run.journal.write_bytes(run.journal.read_bytes().replace(b"again 50", b"again 59"))
    with Lock.acquire(run) as lock, Journal.open(run, lock) as journal:
        assert [event.line for event in damage_in(journal)] == [50]
        journal.append(Entry(1795356999.0, "", None, journal.repairs[0]))
    with Lock.acquire(run) as lock, Journal.open(run, lock) as journal:
        assert journal.repairs == ()


def test_a_crash_between_two_repairs_does_not_lose_the_tail_that_is_gone(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    lines = FIFTY.replace(b'"line 25"', b'"line 99"').splitlines(keepends=True)
    run.journal.write_bytes(b"".join(lines[:48]) + b'{"torn')
    run.head.write_text(f"49 {lines[48][-67:-3].decode()}\n")
    with Lock.acquire(run) as lock, Journal.open(run, lock) as journal:
        assert [type(event) for event in journal.repairs] == [
            JournalDamaged,
            JournalRepaired,
            JournalDamaged,
        ]
        journal.append(Entry(1795356999.0, "", None, journal.repairs[0]))
    told = [
        entry.event
        for entry in read(run.journal).entries
        if isinstance(entry.event, JournalDamaged)
    ]
    assert [event.line for event in told] == [49]
    with Lock.acquire(run) as lock, Journal.open(run, lock) as journal:
        assert [event.line for event in damage_in(journal)] == [25]


def damage_in(journal: Journal) -> list[JournalDamaged]:
    return [event for event in journal.repairs if isinstance(event, JournalDamaged)]
