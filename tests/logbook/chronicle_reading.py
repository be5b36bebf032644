"""How the tests of the chronicle make, damage and read one."""

from pathlib import Path

from opt_logbook.record.run_directory import RunDirectory
from opt_logbook.render.chronicle import Chronicle
from opt_logbook.render.render import render
from opt_logbook.story.sentences import Sentence

from tests.logbook.demo_run import NODES, DemoRun


def markdown_of(run: RunDirectory) -> str:
    return render(run).markdown.read_text()


def half_a_run(path: Path) -> DemoRun:
    """Attempt 1.00 at step 60, its journal still open."""
    demo = DemoRun(path)
    demo.create()
    demo.start("1.00", 0, NODES, ("node-3",), reason="the run begins")
    demo.train(2, 60)
    return demo


def spoil(run: RunDirectory, old: bytes, new: bytes) -> None:
    """Damage the first line of the journal that says `old`."""
    data = run.journal.read_bytes()
    assert old in data
    run.journal.write_bytes(data.replace(old, new, 1))


def sentences_in(chronicle: Chronicle) -> list[Sentence]:
    incidents = [
        *chronicle.open_incidents,
        *(i for entry in chronicle.entries for i in entry.incidents),
    ]
    return [
        *(sentence for entry in chronicle.entries for sentence in entry.sentences),
        *(
            sentence
            for incident in incidents
            for section in incident.sections
            for sentence in section.sentences
        ),
        *chronicle.before,
    ]


def figures_of(run: RunDirectory) -> dict[str, str]:
    return {path.stem: path.read_text() for path in render(run).figures}
