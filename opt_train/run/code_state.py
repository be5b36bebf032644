"""The code that an attempt runs: its commit, the packages that decide the numbers, and the copy
that a lineage keeps and is compared with."""

import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import opt_logbook
from opt_logbook.record.durable_file import replace_file

import opt_train
from opt_train.config.run_config import RunConfig, to_json
from opt_train.protocol.exits import BadInput

PACKAGES = ("torch", "numpy", "hydra-core", "datasets", "tokenizers", "safetensors")
"""What else decides the numbers; their versions go into every attempt's journal line, and a lineage
keeps to them."""

FILES_NAMED = 3
"""Sources that are named when they are not those a lineage began with; the others are
counted."""


@dataclass(frozen=True, slots=True)
class CodeState:
    """The code that an attempt runs, for the journal."""

    git_commit: str = ""
    """Of the checkout that it runs from; empty outside a checkout."""
    git_dirty: bool = False
    """The checkout has changes."""
    packages: Mapping[str, str] = field(default_factory=dict)
    """Versions of Python and of the packages that decide the numbers."""


def read_code_state() -> CodeState:
    """The code that this process runs."""
    commit, dirty = _git_state()
    return CodeState(commit, dirty, package_versions())


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    found = {"python": sys.version.split()[0], "opt-train": metadata.version("opt-train")}
    for package in PACKAGES:
        found[package] = metadata.version(package)
    return found


def _git_state() -> tuple[str, bool]:
    """Commit of the checkout this code runs from, and whether it has changes; empty outside a
    checkout."""
    package = Path(opt_train.__path__[0]).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package.parent), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        # An installed wheel may lie inside somebody else's repository.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != package.parent:
            return "", False
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return "", False


def code_difference(kept: Path) -> list[str]:
    """What runs now and is not in `kept`, a lineage's copy: versions of `PACKAGES` first, then
    sources.

    Raises:
        BadInput: the copy cannot be read.
    """
    try:
        lines = (kept / "packages.txt").read_text().splitlines()
        before = _sources({package: kept / package for package in _packages()})
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{kept} cannot be read ({error}); restore it, or choose another name="
        ) from None
    recorded = dict(line.split("==", 1) for line in lines if "==" in line)
    installed = package_versions()
    found = [
        f"{package}: {recorded.get(package, 'absent')} -> {installed[package]}"
        for package in PACKAGES
        if recorded.get(package) != installed[package]
    ]
    now = _sources(_packages())
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    for name in names[:FILES_NAMED]:
        fate = "changed"
        if name not in before:
            fate = "new"
        elif name not in now:
            fate = "gone"
        found.append(f"code: {name} {fate}")
    if len(names) > FILES_NAMED:
        found.append(f"code: and {len(names) - FILES_NAMED} more")
    return found


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


def copy_code(target: Path, config: RunConfig) -> None:
    """The sources, versions and configuration that a lineage begins with."""
    # What an earlier start left that died before it could journal the lineage.
    shutil.rmtree(target, ignore_errors=True)
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    for package, source in _packages().items():
        shutil.copytree(source, target / package, ignore=ignore, dirs_exist_ok=True)
    installed: dict[str, str] = {}
    for distribution in metadata.distributions():
        # The first on the path is the one that is imported.
        installed.setdefault(distribution.name.lower().replace("_", "-"), distribution.version)
    listed = sorted(f"{name}=={version}" for name, version in installed.items())
    packages = "\n".join([f"# Python {sys.version.split()[0]}", *listed]) + "\n"
    replace_file(target / "packages.txt", packages.encode(), durable=True)
    replace_file(target / "config.json", to_json(config).encode(), durable=True)
