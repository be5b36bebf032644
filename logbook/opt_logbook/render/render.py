"""From a run directory to its chronicle: `chronicle/index.html`, `chronicle/chronicle.md`,
`chronicle/figures/*.svg`.

A pure function of journal and metrics: the same bytes whatever the path, clock, time zone, locale
or hash seed, and nothing else of the run is opened.
"""

from dataclasses import dataclass
from pathlib import Path

from opt_logbook.record import metrics
from opt_logbook.record.chain import read_bytes
from opt_logbook.record.codec import split
from opt_logbook.record.durable_file import replace_file
from opt_logbook.record.run_directory import RunDirectory
from opt_logbook.render import plots
from opt_logbook.render.chronicle import Chronicle, compose
from opt_logbook.render.markdown import to_markdown
from opt_logbook.render.page import to_html
from opt_logbook.story.fold import fold_story

UNNAMED = "an unnamed run"
"""Title where the journal does not tell: the folder's name would make the page depend on its
path."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """What was written."""

    page: Path
    markdown: Path
    figures: tuple[Path, ...]
    chronicle: Chronicle


def render(run: RunDirectory) -> Rendered:
    """Write the chronicle of `run`, each file by rename. Works on an empty, a living and a damaged
    run.

    Raises:
        OSError: the run directory cannot be read, or `chronicle/` not be written.
    """
    # Once: a supervisor may append meanwhile, and the story and its quoted lines must be of the
    # same bytes.
    data = run.journal.read_bytes() if run.journal.exists() else b""
    reading = read_bytes(data)
    story = fold_story(reading, metrics.read(run))
    chronicle = compose(
        story, UNNAMED, _raw_lines(data, reading.lines, [entry.seq for entry in reading.entries])
    )
    figures = plots.draw(story)

    folder = run.chronicle / "figures"
    run.make_folder(folder)
    # Before the Markdown that names them: whoever opens it in between misses none.
    drawn = tuple(_replace(folder / f"{name}.svg", text) for name, text in figures.items())
    return Rendered(
        page=_replace(run.chronicle / "index.html", to_html(chronicle, figures)),
        markdown=_replace(run.chronicle / "chronicle.md", to_markdown(chronicle, tuple(figures))),
        figures=drawn,
        chronicle=chronicle,
    )


def _raw_lines(data: bytes, numbers: tuple[int, ...], seqs: list[int]) -> dict[int, str]:
    """Each verified line by its seq, without its hash."""
    lines = data.split(b"\n")
    raw: dict[int, str] = {}
    for number, seq in zip(numbers, seqs, strict=True):
        parts = split(lines[number - 1])
        if parts:
            # The hash was cut off and the closing brace with it.
            raw[seq] = parts[0].decode("utf-8", "replace") + "}"
    return raw


def _replace(path: Path, text: str) -> Path:
    # Not durable: what a crash of the machine takes, `logbook render` makes again.
    replace_file(path, text.encode("utf-8", "replace"))
    return path
