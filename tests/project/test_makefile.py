"""`make` is the first thing a newcomer types: what is missing must be one sentence with the
mend."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def make(checkout: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL")}
    return subprocess.run(
        ["make", *words],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def stand_in(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_an_old_python_is_one_sentence(checkout: Path) -> None:
    old = stand_in(checkout / "old", "#!/bin/sh\nexit 1\n")
    done = make(checkout, "demo", f"PYTHON={old}")
    assert done.returncode != 0
    assert done.stdout == (
        f"opt-train needs Python 3.11 or newer, and {old} is not; name one: make "
        "PYTHON=python3.11 demo\n"
    )
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("name", ["python3", "python3.12"])
def test_a_missing_venv_module_is_one_sentence_with_the_command(checkout: Path, name: str) -> None:
    script = f'#!/bin/sh\ncase "$2" in *venv*) exit 1;; esac\nexec {sys.executable} "$@"\n'
    python = stand_in(checkout / name, script)
    done = make(checkout, "demo", f"PYTHON={python}")
    assert done.returncode != 0
    assert (
        done.stdout
        == f"Python's venv module is missing; install it with: apt-get install {name}-venv\n"
    )
    assert not (checkout / ".venv").exists()


@pytest.fixture
def installed(checkout: Path) -> Path:
    """A checkout whose environment is there, with a stand-in that leaves with the code in
    `code`."""
    stand_in(checkout / ".venv/bin/opt-train", '#!/bin/sh\necho "opt-train $*"\nexit $(cat code)\n')
    (checkout / ".venv" / "installed").touch()
    return checkout


def test_a_stopped_demo_is_no_error(installed: Path) -> None:
    (installed / "code").write_text("75")
    done = make(installed, "demo")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "opt-train run experiment=demo\nstopped with its state saved; make demo goes on from "
        "there\n"
    )


def test_a_failed_demo_is_an_error(installed: Path) -> None:
    (installed / "code").write_text("3")
    assert make(installed, "demo").returncode != 0


def test_only_fresh_removes_the_old_demo(installed: Path) -> None:
    (installed / "code").write_text("0")
    (installed / "runs" / "demo").mkdir(parents=True)
    assert make(installed, "demo").returncode == 0
    assert (installed / "runs" / "demo").exists()
    assert make(installed, "demo", "FRESH=0").returncode == 0
    assert (installed / "runs" / "demo").exists()
    assert make(installed, "demo", "FRESH=1").returncode == 0
    assert not (installed / "runs" / "demo").exists()
