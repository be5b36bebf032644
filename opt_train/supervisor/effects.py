"""Everything the supervisor's core can ask of its host, which carries it out in the order given.

An `Append` is a barrier: nothing behind it happens before the entry is durable. So the world never
sees a decision that a crash could make the journal forget.

=================== ========================================= ===================================
effect              promise                                   what comes back
=================== ========================================= ===================================
`Append`            durable before anything behind it         `JournalWasStalled` if it took long
`Send`              in order, if the agent is connected       facts; nothing if it was lost
`AcknowledgeFact`   as `Send`                                 nothing; a lost one: the fact again
`StartAgent`        tried once                                `ClusterObserved`, a connection
`RequestNodes`      tried once                                `ClusterObserved`, sooner or later
`FenceNode`         tried once, one at a time on a node       `ClusterObserved`: down
`WriteMetrics`      behind the entries before it; not fsynced nothing
`InspectCheckpoint` done                                      `CheckpointInspected`
`CommitManifest`    done, if the lock is still ours           `ManifestCommitted`
`CommitSnapshot`    done, if the lock is still ours           `ManifestCommitted`
`ShareOffences`     tried; the next change or supervisor does nothing
`RetireCheckpoint`  tried; the next supervisor tries it again nothing
`ClearUncommitted`  tried; the next attempt tries it again    nothing
`Show`              at once, ahead of all others              nothing
`Finish`            the last one                              nothing
=================== ========================================= ===================================

"Done": the host reports the outcome, good or bad. Whatever else fails is logged,
and it is the core that asks again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opt_logbook.record.events import Entry
from opt_logbook.record.hardware import Offence

from opt_train.protocol.commands import Command


@dataclass(frozen=True, slots=True)
class Append:
    """Journal the entry (seq and hash are the journal's to give). The core has folded it
    already."""

    entry: Entry


@dataclass(frozen=True, slots=True)
class Send:
    """Send a command to the node's agent, by the connection that the core knows of; forgotten if
    that is no more (the core repeats itself on connection)."""

    node: str
    command: Command


@dataclass(frozen=True, slots=True)
class AcknowledgeFact:
    """Facts of the node up to `number` are durable or need not be."""

    node: str
    number: int


@dataclass(frozen=True, slots=True)
class StartAgent:
    """Have the cluster start the node's agent, if it does not run."""

    node: str


@dataclass(frozen=True, slots=True)
class RequestNodes:
    """Ask the cluster for `count` nodes more, none of them in `failed`: as many as it is asked for
    already are no news to it. What it gives is in `ClusterObserved`."""

    count: int
    failed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FenceNode:
    """Make sure nothing of the run lives on the node any more; `ClusterObserved` will show it."""

    node: str


@dataclass(frozen=True, slots=True)
class WriteMetrics:
    """Append the line to `metrics/<attempt>.jsonl`. Not a barrier; a line may be lost in a
    crash."""

    attempt: str
    line: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class InspectCheckpoint:
    """Compare the manifest's hash and the files' names and sizes (path relative to the run);
    answer `CheckpointInspected`. The bytes are the ranks' to verify, who read them anyway."""

    path: str
    manifest_sha256: str


@dataclass(frozen=True, slots=True)
class CommitManifest:
    """All ranks have reported: write and rename the manifest, after re-reading the lock; answer
    `ManifestCommitted`.

    `files` maps the path inside `folder` (absolute, as the ranks reported it) to (bytes, sha256).
    """

    path: str
    folder: str
    attempt: str
    step: int
    files: Mapping[str, tuple[int, str]]
    seconds: float


@dataclass(frozen=True, slots=True)
class CommitSnapshot:
    """Every agent holds its ranks' parts: write the manifest at `paths`, after re-reading the lock.

    The answer is one `ManifestCommitted` of the first path; the others are of tiers that the files
    still go on to. `files` maps a name to (bytes, sha256), and `state` is what rank 0 put into
    `state.json`.
    """

    paths: tuple[str, ...]
    attempt: str
    step: int
    files: Mapping[str, tuple[int, str]]
    state: Mapping[str, Any]
    seconds: float


@dataclass(frozen=True, slots=True)
class ShareOffences:
    """Replace what the site's record of repeat offenders has of the run of this name that was
    created then."""

    run: str
    created: float
    """Unix seconds."""
    offences: tuple[Offence, ...]


@dataclass(frozen=True, slots=True)
class RetireCheckpoint:
    """Remove the checkpoint's folder, manifest first. The core has journalled it."""

    path: str


@dataclass(frozen=True, slots=True)
class ClearUncommitted:
    """Remove what saves left under `attempts`, of which nothing lives any more, but for the paths
    in `kept`."""

    attempts: tuple[str, ...]
    kept: frozenset[str]


@dataclass(frozen=True, slots=True)
class Show:
    """What a person at the terminal may want to know now."""

    stage: str
    step: int
    steps: int
    loss: float | None
    tokens_per_second: float | None
    active_nodes: int
    buffer_nodes: int
    attempt: str
    last_incident: str
    waiting_for: str = ""
    """Before it goes on; empty: it trains, or is at rest."""


@dataclass(frozen=True, slots=True)
class Finish:
    """The supervisor is done: release the cluster, render the chronicle, exit with `code` and say
    `message`."""

    code: int
    message: str


Effect = (
    Append
    | Send
    | AcknowledgeFact
    | StartAgent
    | RequestNodes
    | FenceNode
    | WriteMetrics
    | InspectCheckpoint
    | CommitManifest
    | CommitSnapshot
    | ShareOffences
    | RetireCheckpoint
    | ClearUncommitted
    | Show
    | Finish
)
