"""What lives in the tests' small world: agents with slots, ranks in them, and the configuration of
a short run."""

from dataclasses import dataclass, field
from typing import Any

from opt_train.checkpoint.config import CheckpointConfig
from opt_train.clusters.config import ClusterConfig
from opt_train.config.run_config import RunConfig
from opt_train.protocol.commands import Begin, Fetch
from opt_train.protocol.framing import Message
from opt_train.protocol.orders import Order
from opt_train.supervisor.config import SupervisorConfig
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
        "checkpoint": (CheckpointConfig, {"every_steps": 3, "keep": 2}),
    }
    for name, value in changes.items():
        room = next(values for kind, values in rooms.values() if name in kind.__dataclass_fields__)
        room[name] = value
    return RunConfig(**{name: kind(**values) for name, (kind, values) in rooms.items()})


@dataclass
class Rank:
    begin: Begin
    pid: int
    phase: str = "start"
    step: int = 0
    since: float = 0.0
    stopped: bool = False
    orders: list[Order] = field(default_factory=list)


@dataclass
class Slot:
    warm_at: float
    rank: Rank | None = None


@dataclass
class Agent:
    """One node's agent: keeps facts until they are acknowledged, obeys at once, kills its ranks
    when nobody leads."""

    node: str
    pid: int
    slots: list[Slot]
    led_at: float
    connected: bool = False
    link_until: float = 0.0
    """The link is cut until then."""
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


@dataclass
class Group:
    """The ranks of one generation in lockstep: they move when all are there and none is stopped."""

    generation: int
    step: int
    born: float
    moved: float
    order_obeyed: int
    saving: int = -1
    slow_save_until: float = -1.0
    validated: bool = False
