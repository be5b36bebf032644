"""The code that an attempt runs: its commit, and the packages that decide the numbers."""

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import opt_train

PACKAGES = ("torch", "numpy", "hydra-core", "datasets", "tokenizers", "safetensors")
"""What else decides the numbers; their versions go into every attempt's journal line, and a lineage
keeps to them."""


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
