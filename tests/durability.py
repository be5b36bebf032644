"""What was asked of the disk, in order: kill -9 keeps the page cache, so only the calls tell what
power loss would."""

import os
from pathlib import Path

import pytest


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(``sync`` or ``rename``, name of the file or folder) of every call from now on."""
    calls: list[tuple[str, str]] = []

    def watch(name: str) -> None:
        real = getattr(os, name)

        def sync(descriptor: int) -> None:
            calls.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
            real(descriptor)

        monkeypatch.setattr(os, name, sync)

    watch("fsync")
    watch("fdatasync")
    rename = os.replace

    def replace(source: str, target: str) -> None:
        calls.append(("rename", Path(target).name))
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    return calls
