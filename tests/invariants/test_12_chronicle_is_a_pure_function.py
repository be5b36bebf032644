"""Invariant 12: the chronicle is a pure function of the run directory's journal and metrics."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from opt_logbook.record.run_directory import RunDirectory
from opt_logbook.render.render import render

from tests.logbook.demo_run import write_demo

RENDER = """
import locale, sys
from pathlib import Path
from opt_logbook.render.render import render
from opt_logbook.record.run_directory import RunDirectory
try:
    locale.setlocale(locale.LC_ALL, "")
except locale.Error:
    pass
render(RunDirectory(Path(sys.argv[1])))
"""

RENDER_GERMAN = (
    """
import locale
locale.setlocale(locale.LC_ALL, "")
assert f"{1234.5:n}" == "1.234,5", "the locale is in force"
"""
    + RENDER
)

OPENED = """
import json, sys
from pathlib import Path
from opt_logbook.record.run_directory import RunDirectory
from opt_logbook.render.render import render
run = Path(sys.argv[1]).resolve()
opened = []
def watch(event, arguments):
    if event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], (str, Path)):
        path = Path(arguments[0]).absolute()
        if path.is_relative_to(run):
            opened.append(str(path.relative_to(run)))
sys.addaudithook(watch)
render(RunDirectory(run))
print(json.dumps(opened))
"""


def files_of(run: Path) -> dict[str, bytes]:
    folder = run / "chronicle"
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def rendered(run: Path, code: str = RENDER, **environment: str) -> dict[str, bytes]:
    subprocess.run(
        [sys.executable, "-c", code, str(run)],
        check=True,
        env={**os.environ, **environment},
        cwd=run,
    )
    return files_of(run)


def rendered_here(run: Path) -> dict[str, bytes]:
    """By this process, as it is: for what lies in the run directory alone."""
    render(RunDirectory(run))
    return files_of(run)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_demo(tmp_path / "demo").path


def test_the_same_bytes_from_another_path_time_zone_home_and_hash_seed(
    run: Path, tmp_path: Path
) -> None:
    first = rendered(run, PYTHONHASHSEED="1", TZ="UTC", LC_ALL="C")
    assert set(first) == {
        "index.html",
        "chronicle.md",
        "figures/steps.svg",
        "figures/wall_clock.svg",
        "figures/validation.svg",
    }
    elsewhere = tmp_path / "another place" / "with ümlaut & spaces"
    shutil.copytree(run, elsewhere)
    shutil.rmtree(elsewhere / "chronicle")
    home = tmp_path / "home"
    (home / ".config" / "matplotlib").mkdir(parents=True)
    (home / ".config" / "matplotlib" / "matplotlibrc").write_text(
        "lines.linewidth: 9\nfont.size: 31\n"
    )
    environment = {
        "PYTHONHASHSEED": "4711",
        "TZ": "Asia/Kathmandu",
        "LC_ALL": "C.UTF-8",
        "HOME": str(home),
        "XDG_CONFIG_HOME": str(home / ".config"),
        "COLUMNS": "40",
    }
    assert rendered(elsewhere, **environment) == first
    assert rendered(run) == first, "rendering again over the first must change nothing"


def test_the_same_bytes_where_numbers_are_written_with_commas(run: Path, tmp_path: Path) -> None:
    first = rendered(run, LC_ALL="C")
    localedef = shutil.which("localedef")
    if localedef is None:
        pytest.skip("building the locale de_DE.UTF-8 needs localedef")
    locales = tmp_path / "locales"
    locales.mkdir()
    build = [localedef, "--inputfile", "de_DE", "--charmap", "UTF-8", str(locales / "de_DE.UTF-8")]
    built = subprocess.run(build, capture_output=True, text=True, check=False)
    if built.returncode != 0:
        pytest.skip(f"the sources of the locale de_DE.UTF-8 are not here: {built.stderr.strip()}")
    german = {"LC_ALL": "de_DE.UTF-8", "LANG": "de_DE.UTF-8", "LOCPATH": str(locales)}
    assert rendered(run, RENDER_GERMAN, **german) == first


def test_only_journal_and_metrics_are_opened_and_never_the_fault_plan(run: Path) -> None:
    # Whoever opens this pipe waits for ever, and the test's time limit tells.
    os.mkfifo(run / "faults.jsonl")
    (run / "config.yaml").write_text("name: not to be read\n")
    answer = subprocess.run(
        [sys.executable, "-c", OPENED, str(run)],
        check=True,
        stdout=subprocess.PIPE,
        timeout=100,
        cwd=run.parent,
    )
    opened = {name for name in json.loads(answer.stdout) if not name.startswith("chronicle")}
    assert opened == {
        "journal.jsonl",
        "metrics",
        "metrics/1.00.jsonl",
        "metrics/1.01.jsonl",
        "metrics/1.02.jsonl",
    }


def test_now_is_the_time_of_the_last_line(run: Path) -> None:
    for path in run.rglob("*"):
        os.utime(path, (0, 0))
    page = rendered_here(run)["index.html"].decode()
    last = json.loads((run / "journal.jsonl").read_bytes().splitlines()[-1])["time"]
    assert f"as of {last[:10]} {last[11:19]} UTC" in page


def test_what_is_not_the_journal_s_or_the_metrics_changes_nothing(run: Path) -> None:
    first = rendered_here(run)
    (run / "faults.jsonl").write_text('{"kind": "kill-node", "node": "node-9"}\n')
    shutil.rmtree(run / "logs")
    shutil.rmtree(run / "checkpoints")
    (run / "journal.head").unlink()
    assert rendered_here(run) == first
