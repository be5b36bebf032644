"""The chronicle as Markdown (CommonMark). Text from journals and logs is escaped, or fenced where
it is quoted."""

import re

from opt_logbook.render.chronicle import Chronicle
from opt_logbook.story.format import duration, printable
from opt_logbook.story.incident import IncidentStory, Quote
from opt_logbook.story.sentences import Sentence

FIGURES = (
    (
        "steps",
        "Loss, learning rate and gradient norm by step, coloured by attempt; pale: steps that "
        "were lost",
    ),
    (
        "wall_clock",
        "Training loss by wall clock, coloured by attempt; pale: steps that were lost, shaded: no "
        "training",
    ),
    (
        "validation",
        "Validation perplexity of each set by itself, and a unigram model of the held-out text",
    ),
)
"""File name and caption of each figure."""

# What means something in the middle of a text; the marks of lists, headings and rules do so only at
# its start.
_SPECIAL = re.compile(r"[\\`*\[\]<>|~&]|(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])")
_AT_START = re.compile(r"^(\d{1,9})([.)])(?=\s|$)|^([-+=#])")


def escaped(text: str) -> str:
    """`text` so that Markdown shows it and nothing else. Underscores inside words mean nothing and
    stay."""
    text = _SPECIAL.sub(lambda match: "\\" + match[0], printable(text))
    text = text.replace("://", ":\\//")  # otherwise GitHub makes a link of it
    return _AT_START.sub(lambda m: f"{m[1]}\\{m[2]}" if m[1] else f"\\{m[3]}", text)


def fenced(text: str) -> str:
    """`text` as a code block that it cannot end."""
    text = printable(text)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def to_markdown(chronicle: Chronicle, figures: tuple[str, ...]) -> str:
    """`chronicle.md`. `figures` names those that were drawn."""
    parts = [f"# Chronicle of {escaped(chronicle.title)}"]
    if chronicle.as_of:
        parts.append(
            f"Status: {escaped(chronicle.status_text)} · as of {chronicle.as_of} · "
            "\\[J12\\] means line 12 of `journal.jsonl`"
        )
    parts += [f"> **Attention.** {_sentence(sentence)}" for sentence in chronicle.warnings]
    parts.append("## What happened")
    parts += [_paragraph(paragraph) for paragraph in chronicle.summary]
    if chronicle.card:
        rows = "\n".join(
            f"| {escaped(name)} | {_sentence(sentence)} |" for name, sentence in chronicle.card
        )
        parts.append(f"| | |\n|---|---|\n{rows}")
    if chronicle.time_spent:
        parts.append("## How the time was spent")
        total = sum(seconds for _, seconds, _ in chronicle.time_spent) or 1.0
        rows = "\n".join(
            f"| {name} | {duration(seconds)} | {seconds / total:.1%} | {meaning} |"
            for name, seconds, meaning in chronicle.time_spent
        )
        parts.append(f"| | time | share | |\n|---|---:|---:|---|\n{rows}")
        parts.append("Effective training time ratio = kept / wall clock.")
    if figures:
        parts.append("## Figures")
        parts += [
            f"![{caption}](figures/{name}.svg)" for name, caption in FIGURES if name in figures
        ]
    if chronicle.entries:
        parts.append("## Contents")
        rows = "\n".join(
            "| "
            + " | ".join([*map(escaped, entry.contents[:4]), escaped(entry.contents[4])])
            + " |"
            for entry in chronicle.entries
        )
        parts.append(f"| begun | attempt | steps | lasted | why |\n|---|---|---|---|---|\n{rows}")
    parts.append("## Logbook, newest first")
    for incident in chronicle.open_incidents:
        parts += _incident(incident)
    for entry in chronicle.entries:
        parts.append(f"### {escaped(entry.heading)}")
        for incident in entry.incidents:
            parts += _incident(incident)
        parts.append(f"**Attempt {escaped(entry.name)}**")
        parts += _list(entry.sentences)
    if chronicle.before:
        parts.append("### Before the first attempt")
        parts += _list(chronicle.before)
    return "\n\n".join(parts) + "\n"


def _incident(incident: IncidentStory) -> list[str]:
    parts = [f"#### {escaped(incident.heading)}"]
    for section in incident.sections:
        parts.append(f"**{section.title}**")
        parts += _list(section.sentences)
        parts += [_quote(quote) for quote in section.quotes]
    return parts


def _quote(quote: Quote) -> str:
    where = f"{escaped(quote.file)}:{quote.line}" if quote.file else "Seen by the supervisor"
    return f"{where}\n\n{fenced(quote.text)}"


def _list(sentences: tuple[Sentence, ...]) -> list[str]:
    parts: list[str] = []
    items: list[str] = []
    for one in sentences:
        if one.author:
            parts += ["\n".join(items)] if items else []
            items = []
            parts.append(f"> **Note by {escaped(one.author)}:** {_sentence(one)}")
        else:
            items.append(f"- {_sentence(one)}")
    return [*parts, "\n".join(items)] if items else parts


def _sentence(sentence: Sentence) -> str:
    if not sentence.lines:
        return escaped(sentence.text)
    references = ", ".join(f"J{line}" for line in sentence.lines)
    return f"{escaped(sentence.text)} \\[{references}\\]"


def _paragraph(sentences: tuple[Sentence, ...]) -> str:
    return " ".join(map(_sentence, sentences))
