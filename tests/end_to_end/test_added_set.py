"""A person thinks of another text when the run is half done: the run goes on, and is measured on it
from there."""

import json
import shutil
import signal
from pathlib import Path

from opt_logbook.record.events import RunFinished, ValidationMeasured

from opt_train.data.manifest import DatasetManifest
from tests.end_to_end import driving


def test_a_set_added_to_a_run_is_measured_from_there_on(tmp_path: Path) -> None:
    web, data = tmp_path / "web.jsonl", tmp_path / "data"
    web.write_text(
        "".join(
            json.dumps({"text": f"Page {n}: of another kind, again and again. " * 9}) + "\n"
            for n in range(30)
        )
    )
    if driving.prepared().exists():
        shutil.copytree(driving.prepared(), data)
    words = ("train.steps=120", "train.validate_every=40", f"data.directory={data}")
    more = (f'data.validation_sets="web={web}"', "train.validate_sets_every=30")
    run = driving.run_directory(tmp_path)
    process = driving.start(tmp_path, *words)
    try:
        driving.wait_for(lambda: driving.newest_step(run) >= 15, 120, process, tmp_path)
        process.send_signal(signal.SIGINT)
        assert driving.finish(process, tmp_path, 60) == 75, driving.tail(tmp_path)
        before = DatasetManifest.read(data)
        saved = driving.of_kind(run, "run_stopped")[-1].event.saved_step

        process = driving.start(tmp_path, *words, *more)
        assert driving.finish(process, tmp_path, 120) == 0, driving.tail(tmp_path)
    finally:
        driving.end(process, tmp_path)

    after = DatasetManifest.read(data)
    assert after.fingerprint == before.fingerprint
    assert [named.documents for named in after.sets] == [30]
    resumed = driving.of_kind(run, "attempt_started")[-1]
    assert (resumed.attempt, resumed.step) == ("1.01", saved), (
        "the lineage is the same, and so is its state"
    )
    assert any(change.startswith("data.validation_sets: ") for change in resumed.event.difference)

    measured: dict[str, dict[int, ValidationMeasured]] = {}
    for entry in driving.of_kind(run, "validation"):
        measured.setdefault(entry.event.name, {})[entry.step or 0] = entry.event
    assert sorted(measured["validation"]) == [40, 80, 120]
    assert sorted(measured["web"]) == [step for step in (30, 60, 90, 120) if step > saved]
    assert measured["web"][120].tokens == (after.splits["web"] - 1) // 64 * 64, (
        "two ranks read it whole"
    )
    assert measured["web"][120].loss < measured["web"][90].loss
    [finished] = [
        entry.event for entry in driving.entries(run) if isinstance(entry.event, RunFinished)
    ]
    assert finished.validation_perplexity == measured["validation"][120].perplexity

    told = (run.chronicle / "chronicle.md").read_text()
    assert f"Perplexity on web | {measured['web'][120].perplexity:.1f} at step 120" in told
    assert "- Validation perplexity " in told
    assert (
        f"- Perplexity on web: {measured['web'][min(measured['web'])].perplexity:.1f} at step"
        in told
    )
    assert (run.chronicle / "figures" / "validation.svg").read_text().count('<g id="axes_') == 2
