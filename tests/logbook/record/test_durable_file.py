"""Whoever reads a replaced file finds the old content or the new one, whatever happened between."""

import errno
import os
import threading
from pathlib import Path

import pytest
from opt_logbook.record.durable_file import replace_file, sync_folder

from tests.durability import recorded


def test_content_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    replace_file(path, b"a long first content")
    replace_file(path, b"short")
    assert path.read_bytes() == b"short"
    assert os.listdir(tmp_path) == ["state.json"]


def test_a_durable_one_is_on_the_disk_before_its_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = recorded(monkeypatch)
    replace_file(tmp_path / "head", b"12", durable=True)
    assert calls == [("sync", f".head.{os.getpid()}.new"), ("rename", "head")]
    calls.clear()
    replace_file(tmp_path / "page", b"12")
    assert calls == [("rename", "page")], "what can be made again makes nobody wait for the disk"
    calls.clear()
    sync_folder(tmp_path)
    assert calls == [("sync", tmp_path.name)]


@pytest.mark.parametrize("broken", ["replace", "fdatasync"])
def test_an_error_leaves_the_old_content_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    path = tmp_path / "state.json"
    replace_file(path, b"old", durable=True)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="no space left"):
        replace_file(path, b"new", durable=True)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["state.json"]


def test_a_reader_never_sees_half(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    contents = {bytes([letter]) * 200_000 for letter in b"abc"}
    replace_file(path, min(contents))
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for content in sorted(contents):
                replace_file(path, content)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(200):
            assert path.read_bytes() in contents
    finally:
        stop.set()
        writer.join()
