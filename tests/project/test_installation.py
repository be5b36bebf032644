"""What is installed must work without the checkout: presets and launch scripts travel in the
wheel."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--no-build-isolation",
            "--no-deps",
            "--quiet",
            "-w",
            folder,
            ROOT,
        ],
        check=True,
    )
    [path] = folder.glob("opt_train-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel alone in a folder; what it depends on comes from this environment."""
    target = tmp_path_factory.mktemp("installed")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--no-deps",
            "--no-index",
            "--quiet",
            "--target",
            target,
            wheel,
        ],
        check=True,
    )
    return target


def run_installed(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, installed / "bin" / "opt-train", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_wheel_carries_presets_and_launch_scripts_and_no_tests(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for name in (
        "opt_train/configs/config.yaml",
        "opt_train/configs/experiment/demo.yaml",
        "opt_train/cli/main.py",
        "opt_train/launch/one-node.sbatch",
        "opt_logbook/record/events.py",
    ):
        assert name in names
    assert not [name for name in names if name.startswith(("tests", "docs", "runs"))]
    assert [name for name in names if name.endswith("licenses/LICENSE")]


def test_the_installed_wheel_composes_its_own_presets(installed: Path, tmp_path: Path) -> None:
    where = subprocess.run(
        [
            sys.executable,
            "-c",
            "from opt_train.config.compose import configs_directory; print(configs_directory())",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(where.stdout.strip()) == installed / "opt_train" / "configs"
    said = run_installed(installed, tmp_path, "run", "--cfg", "job", "experiment=demo")
    assert said.returncode == 0, said.stderr
    assert "name: demo\n" in said.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_installed_wheel_answers_for_help(installed: Path, tmp_path: Path) -> None:
    said = run_installed(installed, tmp_path, "--help")
    assert (said.returncode, said.stderr) == (0, "")
    assert "opt-train run experiment=demo" in said.stdout


def test_the_checkout_composes_the_same_as_the_wheel(installed: Path, tmp_path: Path) -> None:
    from_wheel = run_installed(installed, tmp_path, "run", "--cfg", "job", "experiment=demo")
    command = Path(sys.executable).with_name("opt-train")
    from_checkout = subprocess.run(
        [command, "run", "--cfg", "job", "experiment=demo"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert from_checkout.returncode == 0, from_checkout.stderr
    assert from_checkout.stdout == from_wheel.stdout
