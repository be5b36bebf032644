"""The fixture `site` for all tests of this folder."""

from tests.slurm.site import site

__all__ = ["site"]
