"""docs/journal.md is a contract: it must say what the code does."""

import json
import re
from pathlib import Path

from opt_logbook.record.inbox import MESSAGE_BYTES_MAX
from opt_logbook.record.lock import Holder
from opt_logbook.record.run_directory import RunDirectory

DOCUMENT = (Path(__file__).parents[3] / "docs" / "journal.md").read_text()


def test_the_line_shown_as_an_example_has_the_keys_of_a_real_one(demo: RunDirectory) -> None:
    example = json.loads(re.findall(r"```json\n(.*)\n```", DOCUMENT)[0])
    real = json.loads(demo.journal.read_bytes().splitlines()[example["seq"] - 1])
    assert list(example) == list(real)
    assert (example["kind"], example["author"]) == (real["kind"], real["author"])


def test_every_metrics_key_and_lock_field_is_documented(demo: RunDirectory) -> None:
    line = json.loads(demo.metrics_of("1.00").read_bytes().splitlines()[0])
    for key in [*line, *Holder.__slots__]:
        assert f"`{key}`" in DOCUMENT
    assert f"{MESSAGE_BYTES_MAX:,} bytes" in DOCUMENT
