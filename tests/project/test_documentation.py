"""Pages that are generated, or that promise something a program can check, must not go stale."""

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest

from opt_train.cli import main as cli
from opt_train.config.compose import compose
from opt_train.config.difference import flatten
from opt_train.config.run_config import RunConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    """docs/generate.py, which is no part of a package."""
    specification = importlib.util.spec_from_file_location(
        "generate", ROOT / "docs" / "generate.py"
    )
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


GENERATED = (
    "README.md",
    "docs/configuration.md",
    "docs/architecture.md",
    "docs/causes.md",
    "docs/stability.md",
    "docs/metrics.md",
    "docs/journal.md",
)


@pytest.mark.parametrize("page", GENERATED)
def test_what_is_generated_is_what_the_code_says(page: str, generator: ModuleType) -> None:
    assert (ROOT / page).read_text() == generator.page(ROOT / page), "run `make docs`"


def test_every_generated_page_is_watched_here(generator: ModuleType) -> None:
    assert set(generator.PAGES) == {ROOT / page for page in GENERATED}


def test_every_key_is_on_the_page_of_keys() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    for key in flatten(RunConfig()):
        assert f"| `{key}` |" in page


def test_the_table_of_sizes_is_table_1(generator: ModuleType) -> None:
    """By hand from arXiv 2205.01068, but for the 992 sequences of the 175B run."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in generator.sizes().splitlines()[2:]
    ]
    assert [row[:5] + row[6:8] for row in rows] == [
        ["`opt-125m`", "12", "12", "768", "3072", "6e-4", "256 (0.5M)"],
        ["`opt-350m`", "24", "16", "1024", "4096", "3e-4", "256 (0.5M)"],
        ["`opt-1.3b`", "24", "32", "2048", "8192", "2e-4", "512 (1M)"],
        ["`opt-2.7b`", "32", "32", "2560", "10240", "1.6e-4", "512 (1M)"],
        ["`opt-6.7b`", "32", "32", "4096", "16384", "1.2e-4", "1024 (2M)"],
        ["`opt-13b`", "40", "40", "5120", "20480", "1e-4", "2048 (4M)"],
        ["`opt-30b`", "48", "56", "7168", "28672", "1e-4", "2048 (4M)"],
        ["`opt-66b`", "64", "72", "9216", "36864", "8e-5", "1024 (2M)"],
        ["`opt-175b`", "96", "96", "12288", "49152", "1.2e-4", "992 (1.9M)"],
    ]


@pytest.mark.parametrize(
    "page",
    ["README.md", "docs/running.md", "docs/configuration.md", "docs/plan.md", "launch/README.md"],
)
def test_every_override_on_a_page_exists(page: str, generator: ModuleType) -> None:
    text = (ROOT / page).read_text().replace("\\\n", " ")
    verbs = r"(opt-train (?:run|prepare|train|plan)|launch/one-node\.sbatch)"
    commands = re.findall(verbs + r" ((?:'[^'\n]*'|[^`#\n('])*)", text)
    given = []
    for verb, words in commands:
        overrides = [
            word for word in shlex.split(words) if "=" in word and not word.startswith("-")
        ]
        # A plan reads neither text nor tokenizer, and so needs no file of a recipe's user.
        files = generator.GIVEN if verb.endswith("plan") else ()
        given.append([*files, *(word for word in overrides if "glob(" not in word)])
    assert any(given)
    for overrides in given:
        assert compose([word for word in overrides if "," not in word and "mine" not in word])


def test_every_example_in_the_help_composes(generator: ModuleType) -> None:
    examples = [
        example for verb in cli.VERBS.values() if verb.configured for example in verb.examples
    ]
    for example in examples:
        overrides = [
            word for word in shlex.split(example) if "=" in word and not word.startswith("-")
        ]
        # Some verbs read neither text nor tokenizer, and so need no file of a recipe's user.
        files = (
            generator.GIVEN
            if "experiment=opt-" in example and "data.corpus=" not in example
            else ()
        )
        assert compose(
            [*files, *(word for word in overrides if "," not in word and "glob(" not in word)]
        )


def test_links_between_pages_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("launch/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
