"""Commands: what the supervisor asks of an agent, and an agent of its warm rank. They travel down
and are obeyed at once.

Every command is safe to receive twice: a generation that runs is not begun again, one that is gone
is not killed. So whoever sends one sends it again when what it is for has not come about, and not
before: `key` says of two commands to one agent whether the second is the first one again.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from opt_train.protocol.framing import Message
from opt_train.protocol.orders import LedgerEntry, Order


class Command(Message, ABC):
    """Base of the commands."""

    __slots__ = ()

    # Abstract, so that a command without one cannot even be made: with a key in common a second
    # order once waited until the first could be sent again.
    @property
    @abstractmethod
    def key(self) -> tuple[str, ...]:
        """Names what is asked among the commands of this kind to one agent."""


@dataclass(frozen=True, slots=True)
class Begin(Command, kind="begin"):
    """Turn the warm process of `slot` into rank `rank`. The agent passes this line on to the rank
    as it is.

    Rank 0 gets it first, with `store_port` 0: it binds its rendezvous store on a free port and
    tells it as a fact; the others get host and port here.
    """

    generation: int
    attempt: str
    node: str
    slot: int
    rank: int
    world_size: int
    local_rank: int
    store_host: str
    # A port picked ahead could be taken by the time the store binds, so rank 0 binds port 0 and
    # reports.
    store_port: int
    config_path: str
    """The resolved configuration, JSON, inside the run directory."""
    config_sha256: str
    run_directory: str
    # No default: to forget it would train from scratch without a word (invariant 2), as metaseq did
    # when a file to restore was missing.
    checkpoint: str | None
    """Absolute path of the checkpoint to restore; None only for a run that has none."""
    manifest_sha256: str | None
    order_number: int
    """The newest order already obeyed or withdrawn; only higher numbers are news."""
    ledger: tuple[LedgerEntry, ...] = ()
    """Lasting orders of the whole run, those that begin behind the checkpoint's step too."""
    journal_head: str = ""
    """Hash of the newest journal line at the start: goes into the attempt's first metrics line and
    its manifests."""
    probe: tuple[int, ...] = ()
    """Of the rollback that the attempt begins with, where it has to go by a restart."""
    probe_order: int = 0
    """Its number."""

    @property
    def key(self) -> tuple[str, ...]:
        return (str(self.generation), str(self.rank))


@dataclass(frozen=True, slots=True)
class Kill(Command, kind="kill"):
    """Kill every rank of generations up to `generation`, after stacks if asked; the answer is
    `GenerationGone`."""

    # "Up to": a node that was cut off may still run an older generation, and one command ends them
    # all.
    generation: int
    stacks: bool

    @property
    def key(self) -> tuple[str, ...]:
        return (str(self.generation),)


@dataclass(frozen=True, slots=True)
class Relay(Command, kind="relay"):
    """Pass `order` to the control pipe of rank 0 of `generation`."""

    generation: int
    order: Order

    @property
    def key(self) -> tuple[str, ...]:
        return (str(self.generation), str(self.order.number))


@dataclass(frozen=True, slots=True)
class Fetch(Command, kind="fetch"):
    """Hold the files `names` of the checkpoint `path`, each verified by the manifest; the answer is
    `Fetched`.

    What the agent holds already is read and verified again, and got anew where it is not good and
    there is a source.
    """

    path: str
    """Under the run directory, where its manifest lies: `memory/...` is held in memory, `node/...`
    on a node's disk."""
    # A copy is believed only if it is what was committed. Megatron's local checkpoints, which have
    # no such check, loaded one corrupt replica 44 times.
    manifest_sha256: str
    names: tuple[str, ...]
    sources: Mapping[str, str]
    """Name -> ``host:port`` of an agent that holds it; names that are missing here must be held
    already."""
    origin: str = ""
    """The checkpoint that holders have the same files under; empty: `path`."""

    @property
    def key(self) -> tuple[str, ...]:
        # Not the sources: where the files come from is no other question.
        return (self.path, *self.names)


@dataclass(frozen=True, slots=True)
class Drop(Command, kind="drop"):
    """Hold nothing of the checkpoint `path` any more."""

    path: str

    @property
    def key(self) -> tuple[str, ...]:
        return (self.path,)


@dataclass(frozen=True, slots=True)
class Preflight(Command, kind="preflight"):
    """Test the node, on which no rank runs, as `burn_in` of the configuration says. What is wrong
    comes as `NodeFinding`; the answer, behind that, is `PreflightEnded`."""

    @property
    def key(self) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True, slots=True)
class Leave(Command, kind="leave"):
    """Kill what still runs, end the agent, give the node back."""

    reason: str

    @property
    def key(self) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True, slots=True)
class Acknowledge(Command, kind="acknowledge"):
    """Facts up to `number` are durable: forget them."""

    number: int

    @property
    def key(self) -> tuple[str, ...]:
        return (str(self.number),)


@dataclass(frozen=True, slots=True)
class LeaderLease(Command, kind="lead"):
    """The supervisor's pulse, every second: the lease. `leader` is its own generation; older ones
    are not obeyed."""

    # A supervisor that was cut off and comes back after another took over must not command.
    leader: int

    @property
    def key(self) -> tuple[str, ...]:
        return (str(self.leader),)
