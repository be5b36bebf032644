"""A message is read whole and in order, and no file that anybody leaves there stops the
supervisor."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from opt_logbook.record.inbox import MESSAGE_BYTES_MAX, REFUSED, drop, waiting
from opt_logbook.record.run_directory import RunDirectory


def take(run: RunDirectory) -> list[dict[str, Any]]:
    """The messages that wait, each removed once it is known, as the supervisor does."""
    messages = waiting(run)
    for dropped in messages:
        dropped.remove()
    return [dropped.message for dropped in messages]


def test_messages_come_once_and_in_order(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert take(run) == []
    for number in range(20):
        drop(run, {"kind": "note", "author": "maria", "text": f"ümlaut {number}"})
    assert [message["text"] for message in take(run)] == [
        f"ümlaut {number}" for number in range(20)
    ]
    assert take(run) == []


def test_a_message_stays_until_it_is_removed(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    drop(run, {"kind": "stop", "by": "maria"})
    first = waiting(run)[0]
    assert waiting(run) == [first]
    first.remove()
    first.remove()
    assert waiting(run) == []


def test_hostile_files_are_set_aside_and_stop_nobody(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    drop(run, {"kind": "note", "text": "before"})
    secret = tmp_path / "secret"
    secret.write_text('{"kind": "note", "text": "not to be read"}')
    (run.inbox / "00-broken.json").write_bytes(b"\xff\x00{")
    (run.inbox / "00-list.json").write_text("[1, 2]")
    (run.inbox / "00-no-kind.json").write_text('{"text": 1}')
    (run.inbox / "00-deep.json").write_text("[" * 60_000)
    (run.inbox / "00-long.json").write_text('{"kind": "' + "x" * MESSAGE_BYTES_MAX + '"}')
    (run.inbox / "00-link.json").symlink_to(secret)
    os.mkfifo(run.inbox / "00-pipe.json")
    (run.inbox / "00-folder.json").mkdir()
    (run.inbox / ".half-written.json").write_text('{"kind": "no')
    drop(run, {"kind": "note", "text": "after"})
    assert [message["text"] for message in take(run)] == ["before", "after"]
    assert sorted(os.listdir(run.inbox)) == [".half-written.json", REFUSED]
    assert len(os.listdir(run.inbox / REFUSED)) == 8
    assert take(run) == []


def test_a_message_that_would_be_refused_is_not_dropped(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with pytest.raises(ValueError, match="too long"):
        drop(run, {"kind": "note", "text": "x" * MESSAGE_BYTES_MAX})
    assert take(run) == []


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.ESTALE])
def test_a_letter_that_could_not_be_read_just_now_waits(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(tmp_path)
    drop(run, {"kind": "stop", "by": "maria"})

    def sick(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", sick)
        assert waiting(run) == []
    assert [message["kind"] for message in take(run)] == ["stop"]
