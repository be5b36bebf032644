"""What lives in the simulated world: agents with slots, ranks in them, and the configuration of a
short run."""

from dataclasses import dataclass, field, fields
from typing import Any

from opt_train.burn_in.config import BurnInConfig
from opt_train.checkpoint.config import CheckpointConfig
from opt_train.clusters.config import ClusterConfig
from opt_train.config.run_config import RunConfig
from opt_train.protocol.commands import Begin, Command, Fetch
from opt_train.protocol.framing import Message
from opt_train.protocol.orders import Order
from opt_train.run.ledger import Ledger
from opt_train.simulation.storage import Trail
from opt_train.supervisor.config import SupervisorConfig
from opt_train.supervisor.inputs import Input
from opt_train.train.config import TrainConfig

STEP_SECONDS = 2
WARM_SECONDS = 2
START_SECONDS = 2
TAIL_FILE = "logs/rank.log"


def make_config(**changes: Any) -> RunConfig:
    """A short run with short patience; `changes` go to the cluster, the supervisor, the portions or
    the saves."""
    patience = {
        "start_seconds": 15.0,
        "step_seconds": 8.0,
        "checkpoint_seconds": 12.0,
        "evaluation_seconds": 12.0,
        "minimum_seconds": 6.0,
        "settle_seconds": 1.0,
        "orphan_seconds": 12.0,
        "join_seconds": 10.0,
    }
    rooms: dict[str, tuple[type, dict[str, Any]]] = {
        "cluster": (ClusterConfig, {"nodes": 2, "buffer_nodes": 1, "slots_per_node": 1}),
        "supervisor": (SupervisorConfig, patience),
        "train": (TrainConfig, {"steps": 9, "global_batch": 8}),
        "burn_in": (BurnInConfig, {}),
        "checkpoint": (CheckpointConfig, {"every_steps": 3, "keep": 2}),
    }
    for name, value in changes.items():
        room = next(
            values for kind, values in rooms.values() if name in {key.name for key in fields(kind)}
        )
        room[name] = value
    return RunConfig(**{name: kind(**values) for name, (kind, values) in rooms.items()})


@dataclass
class Preflights:
    """What is tested, and what is found."""

    sick: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Node -> cause and detail of what is wrong there."""
    asked: list[tuple[float, str]] = field(default_factory=list)
    """When which node's agent was asked to test it."""
    mute: set[str] = field(default_factory=set)
    """Nodes whose agents do not answer that."""
    passed: set[str] = field(default_factory=set)
    """Nodes that have passed since they were last taken out."""


@dataclass
class SimulatedRank:
    begin: Begin
    pid: int
    begun_as: int = 0
    """The generation that its process was begun as; it may have become another since."""
    phase: str = "start"
    step: int = 0
    since: float = 0.0
    stopped: bool = False
    """By a signal, which the kernel shows."""
    stuck: bool = False
    """It hangs in user code, which nothing shows."""
    orders: list[Order] = field(default_factory=list)


@dataclass
class SimulatedSlot:
    warm_at: float
    rank: SimulatedRank | None = None
    begun_up_to: int = 0


@dataclass
class SimulatedAgent:
    """One node's agent: keeps facts until they are acknowledged, obeys at once, kills its ranks
    when nobody leads."""

    node: str
    pid: int
    slots: list[SimulatedSlot]
    led_at: float
    connected: bool = False
    """As its own end of the link sees it."""
    link_until: float = 0.0
    """No link is made until then."""
    late_until: float = 0.0
    """Nothing goes in or out until then; it waits, unless the link ends first."""
    delay: float = 0.0
    """How long everything takes each way."""
    outgoing: list[tuple[float, Input]] = field(default_factory=list)
    incoming: list[tuple[float, Command]] = field(default_factory=list)
    """On their way, with the second in which they are due."""
    served_at: float = 0.0
    """When the supervisor last had a word of it."""
    killed_up_to: int = 0
    number: int = 0
    kept: dict[int, Message] = field(default_factory=dict)
    frozen: bool = False
    first_leader: int = 0
    held: dict[str, set[str]] = field(default_factory=dict)
    """Checkpoint -> names of its files here."""
    spoiled: set[tuple[str, str]] = field(default_factory=set)
    """(checkpoint, name) of those whose bytes are not what they were."""
    verified: set[tuple[str, str]] = field(default_factory=set)
    """(checkpoint, name) of those that were found good since ranks last trained."""
    fetching: list[tuple[float, Fetch]] = field(default_factory=list)
    """What was asked for, and when it will be here."""
    unkillable: bool = False
    """A rank of it hangs in the kernel: it takes kills and can never tell the end."""
    released: bool = False
    """The run has ended, and the scheduler ends it as soon as it reaches it."""


@dataclass
class RankGroup:
    """The ranks of one generation in lockstep: they move when all are there and none is stopped."""

    generation: int
    step: int
    born: float
    moved: float
    order_obeyed: int
    trail: Trail | None
    """What its weights were trained on."""
    slow_save_until: float = -1.0
    """Its ranks are over a save until then, and report progress."""
    ledger: Ledger = ()
    """Lasting orders as the ranks have them."""
    snapshots: dict[int, Trail | None] = field(default_factory=dict)
    """Step -> what the weights were trained on, of the snapshots that all of them have."""
    saves: list[int] = field(default_factory=list)
    """Steps whose saves are under way."""
    leaving: tuple[int, str] | None = None
    """Code and reason with which its ranks leave once their saves are done."""
