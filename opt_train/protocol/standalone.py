"""What ranks without a supervisor learn from rank 0, in place of the `Begin` of an agent."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class StandaloneBegin:
    """What whoever holds the journal decided about an attempt without a supervisor."""

    attempt: str
    config_path: str
    """The resolved configuration, JSON, inside the run directory."""
    config_sha256: str
    run_directory: str
    checkpoint: str | None = None
    """Absolute path of the checkpoint to restore; None only for a run that has none."""
    manifest_sha256: str | None = None
    journal_head: str = ""
    """Hash of the newest journal line at the start."""
    order_number: int = 0
    """The newest order already obeyed or withdrawn."""
    ledger: tuple[Mapping[str, Any], ...] = ()
    """Lasting orders of the whole run, as `run.ledger.to_json` writes them: this record goes to
    the other ranks as JSON."""
