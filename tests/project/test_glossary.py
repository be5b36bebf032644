"""docs/glossary.md is complete: every message has its row, and what a row names exists."""

import importlib
import pkgutil
import re
from pathlib import Path

import pytest
from opt_logbook.record.events import Event

import opt_train.protocol
from opt_train.protocol.framing import Message
from opt_train.supervisor.rules.acknowledgements import SETTLED

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "glossary.md").read_text()

for module in pkgutil.iter_modules(opt_train.protocol.__path__):
    importlib.import_module(f"opt_train.protocol.{module.name}")

KINDS = {
    kind: message
    for kind, message in Message.registry.items()
    if message.__module__.startswith("opt_train.protocol.")
}
WRAPPERS = {"rank_fact", "told"}
"""They carry a fact, and are settled with it."""


def rows_of(title: str) -> list[list[str]]:
    """The cells of the table below `## title`, without its head."""
    section = PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


MESSAGES = {row[0].strip("`"): row for row in rows_of("Messages")}


def test_every_message_has_one_row() -> None:
    assert len(MESSAGES) == len(rows_of("Messages"))
    assert MESSAGES.keys() == KINDS.keys(), "add the message to the table in docs/glossary.md"


@pytest.mark.parametrize("kind", MESSAGES)
def test_a_row_names_its_class_and_journal_lines_that_exist(kind: str) -> None:
    _, name, source, target, answer, _, lines = MESSAGES[kind]
    assert name.strip("`") == KINDS[kind].__name__
    assert source
    assert target
    assert set(re.findall(r"`(\w+)`", answer)) <= KINDS.keys()
    assert set(re.findall(r"`(\w+)`", lines)) <= Event.registry.keys()


def test_numbered_facts_and_no_others_say_when_they_are_settled() -> None:
    """A fact without a rule would be kept for ever, or lost with a supervisor."""
    numbered = {kind for kind, message in KINDS.items() if message in SETTLED} | WRAPPERS
    assert {kind for kind, row in MESSAGES.items() if row[5]} == numbered


@pytest.mark.parametrize("row", rows_of("Nouns"), ids=lambda row: row[0])
def test_a_noun_lives_where_the_page_says(row: list[str]) -> None:
    for path in re.findall(r"`([\w/]+\.py)`", row[3]):
        assert (ROOT / path).is_file()
