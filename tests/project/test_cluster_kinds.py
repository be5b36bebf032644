"""Only `clusters/` and `config/` know a kind of cluster: whoever else asks for one by name would
have to change with the next back end."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from opt_train.clusters.config import KINDS

PACKAGE = Path(__file__).resolve().parents[2] / "opt_train"
BACK_ENDS = {
    f"opt_train.clusters.{path.stem}"
    for path in (PACKAGE / "clusters").glob("*.py")
    if path.stem.partition("_")[0] in KINDS
}
"""`slurm.py` and what is its own: `slurm_commands.py`."""
OUTSIDE = sorted(
    path
    for path in PACKAGE.rglob("*.py")
    if path.relative_to(PACKAGE).parts[0] not in ("clusters", "config")
)


def imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_there_are_kinds_and_back_ends() -> None:
    assert "local" in KINDS
    assert "opt_train.clusters.local" in BACK_ENDS
    assert len(OUTSIDE) > 100


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_nobody_else_asks_for_a_kind_or_imports_a_back_end(path: Path) -> None:
    tree = ast.parse(path.read_text())
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert not texts & set(KINDS), f"{path} asks for a kind of cluster"
    assert not set(imports(tree)) & BACK_ENDS, f"{path} imports a back end; ask make_cluster"


def test_one_function_imports_the_back_ends() -> None:
    importers = {
        path.stem
        for path in (PACKAGE / "clusters").glob("*.py")
        if path.stem.partition("_")[0] not in KINDS
        and set(imports(ast.parse(path.read_text()))) & BACK_ENDS
    }
    assert importers == {"make_cluster"}
