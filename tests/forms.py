"""Tests in two forms: a short one, which `make test` runs, and the whole one, which is slow."""

from collections.abc import Iterable
from typing import Any

import pytest

FORMS = ("short", pytest.param("whole", marks=pytest.mark.whole))
"""For tests that take the form alone."""


def in_forms(short: Iterable[Any], whole: Iterable[Any]) -> list[Any]:
    """Each of `short` behind the word "short", and each of `whole` behind "whole", marked so."""
    return [
        *(pytest.param("short", *_several(each)) for each in short),
        *(pytest.param("whole", *_several(each), marks=pytest.mark.whole) for each in whole),
    ]


def _several(values: Any) -> tuple[Any, ...]:
    return values if isinstance(values, tuple) else (values,)
