"""`make demo` as a newcomer runs it: it trains, breaks, recovers, and its chronicle answers five
questions a fault."""

import json
import os
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from opt_logbook.record.run_directory import RunDirectory

from tests.end_to_end import driving

pytestmark = pytest.mark.timeout(1600)  # whichever test comes first waits for the whole demo

CAUSE_OF = {"kill-node": "node_failure", "kill-rank": "killed", "stop-rank": "hang"}
"""What a diagnosis must arrive at without ever having seen the plan."""


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDirectory, str]:
    folder = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        driving.command("run", "experiment=demo", f"runs={folder / 'runs'}"),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    try:
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return RunDirectory(folder / "runs" / "demo"), done.stdout
    finally:
        left = driving.processes_of(folder)
        driving.end_processes_of(folder)
        assert left == [], "the demo left processes behind"


def faults(run: RunDirectory) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.faults.read_text().splitlines()]


def test_the_demo_breaks_twice_and_finishes_by_itself(demo: tuple[RunDirectory, str]) -> None:
    run, _ = demo
    assert [fault["kind"] for fault in faults(run)] == ["kill-node", "kill-rank"]
    causes = [entry.event.cause for entry in driving.of_kind(run, "incident_diagnosed")]
    assert causes == ["node_failure", "killed"]
    assert [entry.event.outcome for entry in driving.of_kind(run, "incident_closed")] == [
        "recovered",
        "recovered",
    ]
    assert len(driving.of_kind(run, "node_promoted")) == 1
    assert driving.kinds(run).count("run_finished") == 1


def test_data_that_is_garbage_is_seen_passed_over_and_explained(
    demo: tuple[RunDirectory, str],
) -> None:
    run, output = demo
    [seen] = driving.of_kind(run, "instability_seen")
    [probed] = driving.of_kind(run, "data_probed")
    [closed] = driving.of_kind(run, "instability_closed")
    # Batches 100 to 111, of 16 samples each, and what the probe's raster leaves around them.
    assert probed.event.verdict == "bad data"
    assert 1600 - 6 * 16 <= probed.event.bad_from <= 1600
    assert 1792 <= probed.event.bad_to <= 1792 + 12 * 16
    assert closed.event.outcome == "helped"
    assert f"instability 1 at step {seen.step}: " in output
    story = (run.chronicle / "chronicle.md").read_text()
    assert "Training was unstable once, and the supervisor acted." in story
    assert f"The data was looked at: {probed.event.what}." in story.replace("\\", "")
    assert "It has helped: the loss is " in story


def test_the_model_has_learned_more_than_how_often_tokens_occur(
    demo: tuple[RunDirectory, str],
) -> None:
    run, output = demo
    finished = driving.of_kind(run, "run_finished")[0].event
    created = driving.of_kind(run, "run_created")[0].event
    assert finished.validation_perplexity <= created.unigram_perplexity / 2
    for figure in (finished.validation_perplexity, created.unigram_perplexity):
        assert f"{figure:.1f}" in output, "the summary leaves out a perplexity"


def test_the_journal_verifies(demo: tuple[RunDirectory, str]) -> None:
    run, _ = demo
    done = subprocess.run(
        [sys.executable, "-m", "opt_logbook.cli", "verify", str(run.path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_journal_cut_at_its_end_contradicts_what_lies_beside_it(
    demo: tuple[RunDirectory, str], tmp_path: Path
) -> None:
    run, _ = demo
    copy = RunDirectory(
        shutil.copytree(run.path, tmp_path / "demo", ignore=shutil.ignore_patterns("*.safetensors"))
    )
    lines = run.journal.read_bytes().splitlines(keepends=True)
    begun = max(e.seq for e in driving.of_kind(run, "attempt_started"))
    copy.journal.write_bytes(b"".join(lines[: begun - 1]))
    copy.head.unlink()  # whoever cuts one file can cut another; what ranks wrote remains
    done = subprocess.run(
        [sys.executable, "-m", "opt_logbook.cli", "verify", str(copy.path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    for anchor in ("metrics/", "manifest.json"):
        said = [
            line
            for line in done.stdout.splitlines()
            if anchor in line and "its tail was cut off" in line
        ]
        assert said, f"no word of {anchor} in: {done.stdout}"


def test_the_chronicle_answers_five_questions_about_every_fault(
    demo: tuple[RunDirectory, str],
) -> None:
    run, _ = demo
    text = (run.chronicle / "chronicle.md").read_text()
    # From one heading of an incident to the next heading of any kind.
    incidents = [
        part for part in re.split(r"^#+ ", text, flags=re.MULTILINE) if part.startswith("Incident")
    ]
    assert len(incidents) == len(faults(run))
    taken = [line for lines in driving.metrics(run).values() for line in lines.values()]
    for fault in faults(run):
        # What broke: the heading names the cause and the victim.
        [story] = [
            part
            for part in incidents
            if CAUSE_OF[fault["kind"]] in (heading := part.splitlines()[0])
            and fault["node"] in heading
        ]
        when = re.search(r"(\d{4}-\d\d-\d\d) (\d\d:\d\d:\d\d) UTC, after step (\d+)", story)
        assert when, "when: the heading has no time"
        seen = datetime.fromisoformat(f"{when[1]}T{when[2]}").replace(tzinfo=UTC).timestamp()
        assert -1 <= seen - fault["time"] <= 15, "when: not within 15 s of the deed"
        # The ranks went on for as long as nothing was seen.
        between = [line for line in taken if fault["time"] <= line["time"] <= seen + 1]
        assert abs(int(when[3]) - fault["step"]) <= 3 + len(between), (
            "when: not the step of the deed"
        )
        assert re.search(r"SIGKILL", story), "why: the evidence does not say SIGKILL"
        restarted = re.search(
            r"was started on (.*) from the snapshot in the nodes' memory of step (\d+)", story
        )
        assert restarted, "what was done: no restart from a snapshot"
        if fault["kind"] == "kill-node":
            promoted = driving.of_kind(run, "node_promoted")[0].event
            assert f"{promoted.node} took the place of {fault['node']}" in story, (
                "what was done: no word of the buffer"
            )
            assert fault["node"] not in restarted[1], "the dead node is said to train"
        lost = re.search(r"(\d+) steps? \(.* had to be done again", story)
        assert lost, "what it cost: no steps"
        assert int(lost[1]) == int(when[3]) - int(restarted[2]), (
            "what it cost: the steps do not add up"
        )
        assert re.search(r"[0-9.]+ s from the failure until training was back", story), (
            "what it cost: no seconds"
        )


def test_the_page_opens_in_a_browser_without_a_network(
    demo: tuple[RunDirectory, str], tmp_path: Path
) -> None:
    chromium = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    if chromium is None:
        pytest.skip("no chromium on this machine (apt-get install chromium)")
    run, _ = demo
    page = (run.chronicle / "index.html").read_text()
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", page), (
        "the page asks for something from a network"
    )
    done = subprocess.run(
        [
            chromium,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            (run.chronicle / "index.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    assert "node_failure" in done.stdout
    for plotted in (
        "training loss",
        "learning rate",
        "gradient norm",
        "Training loss by wall clock",
    ):
        assert plotted in done.stdout, f"no plot of {plotted}"


def test_a_finished_demo_prints_its_summary_again(demo: tuple[RunDirectory, str]) -> None:
    run, _ = demo
    lines = len(driving.entries(run))
    done = subprocess.run(
        driving.command("run", "experiment=demo", f"runs={run.path.parent}"),
        cwd=run.path.parent.parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "perplexity" in done.stdout
    assert "chronicle/index.html" in done.stdout
    assert len(driving.entries(run)) == lines, "looking at a finished run changed its journal"
