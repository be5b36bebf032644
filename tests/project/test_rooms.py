"""A room's configuration must stay free of everything but the standard library and the marks of its
keys: supervisor, agents and ranks all read it."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "opt_train").glob("*/config.py"))
MARKS = "opt_train.protocol.keys"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.parent.name)
def test_a_rooms_configuration_imports_only_the_standard_library_and_its_marks(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names = [node.module or ""]
        for name in names:
            is_library = name.partition(".")[0] in sys.stdlib_module_names
            assert is_library or name == MARKS, f"{path} imports {name}"


def test_the_page_of_the_architecture_and_the_folders_are_one_picture() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text().partition("## Rooms\n")[2]
    drawn = re.findall(r"^\| `(\w+)/` \|", page, flags=re.MULTILINE)
    houses = (ROOT / "opt_train", ROOT / "logbook" / "opt_logbook")
    rooms = {path.parent.name for house in houses for path in house.glob("*/__init__.py")}
    assert len(drawn) == len(set(drawn))
    assert set(drawn) == rooms
    for path in re.findall(r"`([\w/]+\.py)`", page):
        assert (ROOT / "opt_train" / path).is_file() or path == "config.py"


def test_there_are_rooms() -> None:
    assert len(CONFIGS) >= 7


def test_packages_have_empty_beginnings() -> None:
    for path in [*ROOT.glob("opt_train/**/__init__.py"), *ROOT.glob("logbook/**/__init__.py")]:
        assert path.read_text() == "", f"{path} must stay empty"


def test_the_constraints_pin_exactly_and_name_no_local_build() -> None:
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    assert lines
    for line in lines:
        name, _, version = line.partition("==")
        assert name, line
        assert version, line
        assert "+" not in version, line
        assert "@" not in line, line
