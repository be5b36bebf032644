"""Pages that are generated, or that promise something a program can check, must not go stale."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from opt_train import cli
from opt_train.config import RunConfig, compose, flatten

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_of_keys_is_what_the_dataclasses_say() -> None:
    path = ROOT / "docs" / "generate_configuration.py"
    specification = importlib.util.spec_from_file_location("generate_configuration", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    assert module.PAGE.read_text() == module.page(), "run `make docs`"
    for key in flatten(RunConfig()):
        assert f"| `{key}` |" in module.PAGE.read_text()


@pytest.mark.parametrize("page", ["README.md", "docs/running.md", "docs/configuration.md", "launch/README.md"])
def test_every_override_on_a_page_exists(page: str) -> None:
    text = (ROOT / page).read_text().replace("\\\n", " ")
    commands = re.findall(r"(?:opt-train (?:run|prepare|train)|launch/one-node\.sbatch) ([^`#\n(]*)", text)
    given = [[word for word in shlex.split(words) if "=" in word and not word.startswith("-")] for words in commands]
    assert any(given)
    for overrides in given:
        assert compose([word for word in overrides if "," not in word and "mine" not in word])


def test_every_example_in_the_help_composes() -> None:
    examples = [example for verb in cli.VERBS.values() if verb.configured for example in verb.examples]
    for example in examples:
        overrides = [word for word in example.split() if "=" in word and not word.startswith("-")]
        assert compose([word for word in overrides if "," not in word])


def test_links_between_pages_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("launch/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
