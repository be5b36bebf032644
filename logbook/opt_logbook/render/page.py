"""The chronicle as one HTML page: style and figures inside, no script, nothing fetched. It opens
from a disk."""

import re
from html import escape
from importlib import resources
from urllib.parse import quote as percent_encoded

from opt_logbook.render.chronicle import AttemptStory, Chronicle
from opt_logbook.render.markdown import FIGURES
from opt_logbook.render.plots import ALARM, FAINT, GRID, INK, colour_of
from opt_logbook.story.format import duration, printable
from opt_logbook.story.incident import IncidentStory, Quote, Section
from opt_logbook.story.sentences import Sentence

# Log text stands in the page. It is escaped everywhere; should one place be missed, this still lets
# no script run, and fetches nothing that would show a stranger that the page was opened.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Content security: a page that was opened loads nothing and runs nothing."""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

REFERENCES_MAX = 8
"""Journal lines linked behind one sentence; the others are named when one points at them, and in
the Markdown."""


def to_html(chronicle: Chronicle, figures: dict[str, str]) -> str:
    """`index.html`. `figures` are SVG texts by name."""
    body = [
        _header(chronicle),
        *(f'<p class="warning">{_sentence(sentence)}</p>' for sentence in chronicle.warnings),
        _summary(chronicle),
        _card(chronicle),
        _time_spent(chronicle),
        _figures(figures),
        _contents(chronicle),
        _logbook(chronicle),
        _journal(chronicle),
        _footer(chronicle),
    ]
    style = resources.files("opt_logbook").joinpath("page.css").read_text("utf-8")
    text = "\n".join(part for part in body if part)
    return _PAGE.format(
        policy=_POLICY, title=_text(f"Chronicle of {chronicle.title}"), style=style, body=text
    )


def _text(text: str) -> str:
    return escape(printable(text))


def _sentence(sentence: Sentence) -> str:
    if not sentence.lines:
        return _text(sentence.text)
    shown = sentence.lines
    if len(shown) > REFERENCES_MAX:
        shown = shown[: REFERENCES_MAX - 1]
    links = ", ".join(f'<a href="#J{line}">J{line}</a>' for line in shown)
    if shown != sentence.lines:
        rest = ", ".join(f"J{line}" for line in sentence.lines[len(shown) :])
        links += f', <span title="{rest}">and {len(sentence.lines) - len(shown)} more</span>'
    return f'{_text(sentence.text)} <span class="ref">[{links}]</span>'


# The top ------------------------------------------------------------------------------------------


def _header(chronicle: Chronicle) -> str:
    as_of = f"<span>as of {chronicle.as_of}</span>" if chronicle.as_of else ""
    return (
        f'<header>\n<p class="over">Chronicle</p>\n<h1>{_text(chronicle.title)}</h1>\n<div '
        'class="status">'
        '<span class="badge '
        f'{chronicle.status}">{_text(chronicle.status_text)}</span>{as_of}</div>\n</header>'
    )


def _summary(chronicle: Chronicle) -> str:
    paragraphs = "\n".join(
        f"<p>{' '.join(map(_sentence, paragraph))}</p>" for paragraph in chronicle.summary
    )
    return f'<section class="summary" aria-label="What happened">\n{paragraphs}\n</section>'


def _card(chronicle: Chronicle) -> str:
    rows = "\n".join(
        f"<dt>{_text(name)}</dt><dd>{_sentence(sentence)}</dd>" for name, sentence in chronicle.card
    )
    return f'<dl class="card">\n{rows}\n</dl>' if rows else ""


def _time_spent(chronicle: Chronicle) -> str:
    total = sum(seconds for _, seconds, _ in chronicle.time_spent)
    if not total:
        return ""
    bar = "".join(
        f'<span class="{name}" style="width:{seconds / total:.3%}"></span>'
        for name, seconds, _ in chronicle.time_spent
    )
    rows = "\n".join(
        f'<tr><td class="nowrap"><span class="swatch {name}"></span>{name}</td>'
        f'<td class="number">{duration(seconds)}</td><td '
        f'class="number">{seconds / total:.1%}</td><td>{meaning}</td></tr>'
        for name, seconds, meaning in chronicle.time_spent
    )
    return (
        '<h2>How the time was spent</h2>\n<div class="bar" '
        f'aria-hidden="true">{bar}</div>\n<table>\n{rows}\n</table>\n'
        "<p><small>Effective training time ratio = kept / wall clock.</small></p>"
    )


def _figures(figures: dict[str, str]) -> str:
    shown = "\n".join(
        f"<figure>\n{inlined(name, figures[name])}\n<figcaption>{caption}.</figcaption>\n</figure>"
        for name, caption in FIGURES
        if name in figures
    )
    return f"<h2>Figures</h2>\n{shown}" if shown else ""


def inlined(name: str, svg: str) -> str:
    """An SVG file as part of the page: without prologue, with ids of its own, in the page's
    colours."""
    svg = svg[svg.index("<svg") :].strip()
    # All figures stand in one document: with clip paths of the same name one would cut another's
    # curves.
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'((?:xlink:)?href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for colour, variable in ((INK, "ink"), (FAINT, "faint"), (GRID, "rule"), (ALARM, "alarm")):
        svg = svg.replace(colour, f"var(--{variable})")
    # matplotlib names the fonts it measured with; a reader's machine may not have them.
    return svg.replace("'DejaVu Sans'", "'DejaVu Sans', system-ui, sans-serif")


# The logbook --------------------------------------------------------------------------------------


def _contents(chronicle: Chronicle) -> str:
    if not chronicle.entries:
        return ""
    rows = []
    for index, entry in enumerate(chronicle.entries):
        begun, attempt, steps, lasted, why = map(_text, entry.contents)
        swatch = f'<span class="swatch" style="background:{_colour(chronicle, index)}"></span>'
        link = f'{swatch}<a href="#{entry.anchor}">{attempt}</a>'
        cells = "".join(f'<td class="nowrap">{cell}</td>' for cell in (begun, link, steps, lasted))
        rows.append(f"<tr>{cells}<td>{why}</td></tr>")
    head = "<tr><th>Begun</th><th>Attempt</th><th>Steps</th><th>Lasted</th><th>Why</th></tr>"
    table = f"<table>\n<thead>{head}</thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody>\n</table>"
    return (
        f'<nav aria-label="Contents">\n<h2>Contents</h2>\n<div class="wide">{table}</div>\n</nav>'
    )


def _logbook(chronicle: Chronicle) -> str:
    parts = [_incident(incident) for incident in chronicle.open_incidents]
    parts += [
        _entry(entry, _colour(chronicle, index)) for index, entry in enumerate(chronicle.entries)
    ]
    if chronicle.before:
        parts.append(
            '<section class="entry">\n<h3>Before the first '
            f"attempt</h3>\n{_list(chronicle.before)}\n</section>"
        )
    return "<h2>Logbook, newest first</h2>\n" + "\n".join(parts) if parts else ""


def _entry(entry: AttemptStory, colour: str) -> str:
    incidents = "\n".join(_incident(incident) for incident in entry.incidents)
    return (
        f'<section class="entry" id="{entry.anchor}" '
        f'style="--attempt:{colour}">\n<h3>{_text(entry.heading)}</h3>\n'
        f"{incidents}\n{_list(entry.sentences)}\n</section>"
    )


def _colour(chronicle: Chronicle, newest_first: int) -> str:
    return colour_of(len(chronicle.entries) - 1 - newest_first)


def _incident(incident: IncidentStory) -> str:
    sections = "\n".join(_section(section) for section in incident.sections)
    opening = f'<article class="incident" id="incident-{incident.number}">'
    return f"{opening}\n<h4>{_text(incident.heading)}</h4>\n{sections}\n</article>"


def _section(section: Section) -> str:
    quotes = "\n".join(_quote(quote) for quote in section.quotes)
    return f'<p class="label">{section.title}</p>\n{_list(section.sentences)}\n{quotes}'


def _quote(quote: Quote) -> str:
    place = f"{quote.file}:{quote.line}"
    if not quote.file:
        source = "seen by the supervisor"
    # The journal is input: no link of it may lead out of the run directory.
    elif ".." in quote.file.split("/") or quote.file.startswith("/"):
        source = _text(place)
    else:
        # Relative to chronicle/, and percent-encoded: a file named `javascript:...` is a file.
        source = (
            "<a "
            f'href="../{percent_encoded(quote.file.encode("utf-8", "replace"))}">{_text(place)}</a>'
        )
    return (
        f'<div class="quote"><span class="from">{source}</span><pre>{_text(quote.text)}</pre></div>'
    )


def _list(sentences: tuple[Sentence, ...]) -> str:
    parts: list[str] = []
    items: list[str] = []
    for one in sentences:
        if not one.author:
            items.append(f"<li>{_sentence(one)}</li>")
            continue
        if items:
            parts.append('<ul class="said">' + "\n".join(items) + "</ul>")
            items = []
        parts.append(
            '<blockquote class="note"><span class="by">Note by '
            f"{_text(one.author)}</span>{_sentence(one)}</blockquote>"
        )
    if items:
        parts.append('<ul class="said">' + "\n".join(items) + "</ul>")
    return "\n".join(parts)


def _journal(chronicle: Chronicle) -> str:
    if not chronicle.journal_lines:
        return ""
    items = "\n".join(
        f'<li id="J{number}"><b>J{number}</b> {_text(line)}</li>'
        for number, line in chronicle.journal_lines.items()
    )
    return (
        "<details>\n<summary>The journal lines that this page refers to</summary>\n"
        f'<ul class="journal">\n{items}\n</ul>\n</details>'
    )


def _footer(chronicle: Chronicle) -> str:
    return (
        "<footer>J12 is line 12 of journal.jsonl. All times are UTC. Rendered from the run "
        "directory alone; "
        "<code>logbook verify</code> says whether the journal is whole.</footer>"
    )
