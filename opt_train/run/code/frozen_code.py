"""The code that a lineage trains with: the copy `code/<lineage>/`, made when the lineage opens.

Agents and ranks run from it (`cluster.code`), so what happens to a checkout or an installation
under a run changes nothing at its next restart: not after a `git pull`, not months later. It is
made whole or not at all: beside its place, durable, then renamed. The journal has its hash, and
each start compares; a copy that was edited is refused.

Frozen is what trains. The supervisor runs from the installation, so a fault of its own is mended
there, between two starts, without a new lineage. It must then still be understood by the agents
and ranks of the copy, which is asked of the copy itself (`run/understood.py`).

The copy holds our two packages. Python, torch and the rest are the environment's: too large to
copy, so their versions are kept and compared instead.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import opt_logbook
from opt_logbook.record.durable_file import replace_file, sync_folder

import opt_train
from opt_train.config.run_config import RunConfig, to_json
from opt_train.protocol.exits import BadInput
from opt_train.run.code.code_state import PACKAGES, CodeState, package_versions, read_code_state

RECORD = "code.json"
FILES_NAMED = 3
"""Sources that are named when they are not those a lineage began with; the others are
counted."""
ANSWER_SECONDS = 120.0
_COPIES_AT_ONCE = 16
"""Files that are made durable at once: one after the other they take ten times as long."""


@dataclass(frozen=True, slots=True)
class FrozenCode:
    """What is on record of a copy."""

    state: CodeState
    """Of the code when it was copied."""
    sha256: str
    """Of its sources: `sha256_of_sources`."""


@dataclass(frozen=True, slots=True)
class CodeDifference:
    """What runs now and is not in a lineage's copy, as sentences."""

    packages: tuple[str, ...] = ()
    """Versions of `PACKAGES`."""
    sources: tuple[str, ...] = ()


def freeze(target: Path, config: RunConfig) -> None:
    """Make `target` the copy of the code that runs, with its versions and the configuration."""
    partial = target.with_name(f".{target.name}.new")
    # What earlier starts left that died before they could journal the lineage.
    for left in (partial, target):
        shutil.rmtree(left, ignore_errors=True)
    copy_sources(_packages(), partial)
    record = FrozenCode(read_code_state(), sha256_of_sources(partial))
    for name, content in (
        ("packages.txt", _installed()),
        ("config.json", to_json(config)),
        (RECORD, json.dumps(asdict(record), indent=2, sort_keys=True) + "\n"),
    ):
        replace_file(partial / name, content.encode(), durable=True)
    sync_folder(partial)
    # From this line on it is there, and whole: everything in it was made durable before, so that no
    # power loss leaves the name over half of it.
    partial.rename(target)
    sync_folder(target.parent)


def copy_sources(packages: Mapping[str, Path], target: Path) -> None:
    """Copy each package as `target`/name, durable, without what was compiled of it."""
    pairs = []
    for name, folder in packages.items():
        for path in folder.rglob("*"):
            # What was compiled is made anew in its place, by the Python that will run it.
            if path.is_file() and path.suffix != ".pyc":
                pairs.append((path, target / name / path.relative_to(folder)))
    folders = {target, *(copy.parent for _, copy in pairs)}
    for made in sorted(folders):
        made.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(_COPIES_AT_ONCE) as threads:
        list(threads.map(lambda pair: _copy_durably(*pair), pairs))
    for made in folders:
        sync_folder(made)


def _copy_durably(source: Path, target: Path) -> None:
    target.write_bytes(source.read_bytes())
    descriptor = os.open(target, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_record(kept: Path) -> FrozenCode | None:
    """What is on record of the copy `kept`; None: it was made before there were records.

    Raises:
        BadInput: the record cannot be read.
    """
    try:
        fields = json.loads((kept / RECORD).read_text())
        return FrozenCode(CodeState(**fields["state"]), fields["sha256"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _unreadable(kept, error) from None


def sha256_of_sources(folder: Path) -> str:
    """Hash of names and contents of the sources of both packages in `folder`."""
    return _sha256(_sources(packages_in(folder)))


def packages_in(folder: Path) -> dict[str, Path]:
    """Where a copy `folder` has each package."""
    return {name: folder / name for name in _packages()}


def sha256_of_running_code() -> str:
    """`sha256_of_sources` of a copy of the code that this process runs."""
    return _sha256(_sources(_packages()))


def code_difference(kept: Path) -> CodeDifference:
    """What runs now and is not in `kept`, a lineage's copy.

    Raises:
        BadInput: the copy cannot be read.
    """
    try:
        lines = (kept / "packages.txt").read_text().splitlines()
        before = _sources(packages_in(kept))
    except (OSError, ValueError) as error:
        raise _unreadable(kept, error) from None
    recorded = dict(line.split("==", 1) for line in lines if "==" in line)
    installed = package_versions()
    packages = tuple(
        f"{package}: {recorded.get(package, 'absent')} -> {installed[package]}"
        for package in PACKAGES
        if recorded.get(package) != installed[package]
    )
    now = _sources(_packages())
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    found = []
    for name in names[:FILES_NAMED]:
        fate = "changed"
        if name not in before:
            fate = "new"
        elif name not in now:
            fate = "gone"
        found.append(f"code: {name} {fate}")
    if len(names) > FILES_NAMED:
        found.append(f"code: and {len(names) - FILES_NAMED} more")
    return CodeDifference(packages, tuple(found))


def why_not_understood(kept: Path, config: RunConfig, wire: str) -> str:
    """Why agents and ranks of the copy `kept` cannot work for a supervisor with this configuration
    and these messages (`understood.wire_signature`); empty: they can."""
    try:
        answer = subprocess.run(
            [sys.executable, "-P", "-m", "opt_train.run.understood"],
            input=to_json(config),
            capture_output=True,
            text=True,
            timeout=ANSWER_SECONDS,
            check=False,
            env={**os.environ, **code_environment(kept)},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"its code cannot be asked: {error}"
    if answer.returncode != 0:
        said = answer.stderr.strip().splitlines()
        return said[-1] if said else f"its code ends with {answer.returncode}"
    return "" if answer.stdout.strip() == wire else "it speaks another protocol"


def code_environment(code: Path | None) -> dict[str, str]:
    """The environment variables of programs that run from the folder `code`; none for the
    installation. What a person has set comes behind it, for modules of their own."""
    if code is None:
        return {}
    # An empty part would mean the working directory, where anybody may have put a module.
    others = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return {"PYTHONPATH": os.pathsep.join([str(code), *(other for other in others if other)])}


def _installed() -> str:
    installed: dict[str, str] = {}
    for distribution in metadata.distributions():
        # The first on the path is the one that is imported.
        installed.setdefault(distribution.name.lower().replace("_", "-"), distribution.version)
    listed = sorted(f"{name}=={version}" for name, version in installed.items())
    return "\n".join([f"# Python {sys.version.split()[0]}", *listed, ""])


def _packages() -> dict[str, Path]:
    """The packages whose code decides what a run computes and records, and where they run from."""
    return {package.__name__: Path(package.__path__[0]) for package in (opt_train, opt_logbook)}


def _sources(packages: Mapping[str, Path]) -> dict[str, bytes]:
    """Name to content of each source file. Presets and launch scripts, which a wheel carries along,
    are none."""
    return {
        f"{package}/{path.relative_to(folder).as_posix()}": path.read_bytes()
        for package, folder in packages.items()
        for path in folder.rglob("*.py")
    }


def _sha256(sources: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256()
    parts: Iterable[bytes]
    for name in sorted(sources):
        parts = (name.encode(), sources[name])
        for part in parts:  # with its length: no two sets of files have the same bytes
            digest.update(f"{len(part)}:".encode() + part)
    return digest.hexdigest()


def _unreadable(kept: Path, error: Exception) -> BadInput:
    return BadInput(f"{kept} cannot be read ({error}); restore it, or choose another name=")
