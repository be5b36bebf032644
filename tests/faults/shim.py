"""The Python side of `fault_shim.c`: it builds it, tells it which calls to spoil, and reads what it
did."""

import mmap
import os
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("fault_shim.c")

KINDS = ("open", "create", "write", "sync", "rename", "unlink", "mkdir", "stat", "read", "list")
"""Of calls to the file system."""
FILLING = ("mkdir", "create", "write", "sync")
"""What needs space."""
CHANGING = ("create", "write", "sync", "rename", "unlink", "mkdir")

_SHARED_BYTES = 1 << 15
_COUNTERS = struct.Struct("=65Q")
"""Behind the generation: matching calls and ends of stalls of 32 rules, and the count of late
names."""


def compiler() -> str | None:
    """A C compiler of this machine."""
    return shutil.which("gcc") or shutil.which("cc")


def build(folder: Path) -> Path:
    """The compiled shim, in `folder`."""
    library = folder / "fault_shim.so"
    found = compiler()
    assert found is not None
    words = [
        found,
        "-shared",
        "-fPIC",
        "-O1",
        "-Wall",
        "-Wextra",
        "-o",
        str(library),
        str(SOURCE),
        "-ldl",
        "-pthread",
    ]
    subprocess.run(words, check=True, timeout=60)
    return library


@dataclass(frozen=True, slots=True)
class Rule:
    """See `fault_shim.c`."""

    fault: str
    path: str
    calls: tuple[str, ...] = KINDS
    first: int = 1
    times: int = 1
    seconds: float = 0.0
    chance: int = 1000
    seed: int = 0
    process: str = "*"

    def __str__(self) -> str:
        fields = (
            self.fault,
            self.first,
            self.times,
            self.seconds,
            self.chance,
            self.seed,
            self.process,
            self.path,
        )
        return "\t".join((",".join(self.calls), *map(str, fields)))


@dataclass(frozen=True, slots=True)
class Fired:
    """One line of the log."""

    seconds: float
    """Of the monotonic clock."""
    pid: int
    call: str
    fault: str
    path: str


class Shim:
    """The rules for all processes that were started with `environment`; they may change while those
    live."""

    def __init__(self, library: Path, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        (folder / "rules").touch()
        (folder / "log").touch()
        (folder / "shared").write_bytes(bytes(_SHARED_BYTES))
        with (folder / "shared").open("r+b") as file:
            self._shared = mmap.mmap(file.fileno(), _SHARED_BYTES)
        self.environment = {"LD_PRELOAD": str(library), "FAULT_SHIM": str(folder)}

    def set(self, *rules: Rule) -> None:
        """From now on these rules, their counters at zero, and an empty log."""
        (self._folder / "log").write_text("")
        new = self._folder / "rules.new"
        new.write_text("".join(f"{rule}\n" for rule in rules))
        new.replace(self._folder / "rules")
        _COUNTERS.pack_into(self._shared, 8, *(0,) * 65)
        (generation,) = struct.unpack_from("=Q", self._shared, 0)
        struct.pack_into("=Q", self._shared, 0, generation + 1)

    def fired(self) -> list[Fired]:
        """What has happened since `set`."""
        lines = (self._folder / "log").read_text(errors="replace").splitlines()
        return [
            Fired(float(s), int(pid), *rest)
            for s, pid, *rest in (line.split("\t") for line in lines)
        ]


def strerror(fault: str) -> str:
    """The system's words for an errno's name."""
    import errno

    return os.strerror(getattr(errno, fault.rstrip("+")))
