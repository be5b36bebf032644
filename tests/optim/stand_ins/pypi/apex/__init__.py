"""Stands for PyPI's `apex`, a toolkit for Pyramid, which has nothing to do with training."""

raise AssertionError("a stranger's package was imported")
