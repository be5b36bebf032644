"""The configuration of a run: every room's dataclass in one, and its resolved form on disk.

Neither torch nor Hydra is imported here: a rank and an agent read the resolved JSON and pay for
neither.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

from opt_train.burn_in.config import BurnInConfig
from opt_train.checkpoint.config import CheckpointConfig
from opt_train.clusters.config import ClusterConfig
from opt_train.config.builder import build
from opt_train.data.config import DataConfig, TokenizerConfig
from opt_train.faults.config import FaultsConfig
from opt_train.model.config import ModelConfig
from opt_train.optim.config import OptimConfig
from opt_train.parallel.config import ParallelConfig, PrecisionConfig
from opt_train.protocol.keys import NOT_NEGATIVE, OPERATIONAL, TRAINING, Choices, Law, Matches
from opt_train.sinks.config import SinksConfig
from opt_train.stability.config import StabilityConfig
from opt_train.supervisor.config import SupervisorConfig
from opt_train.train.config import TrainConfig

FOLDER_NAME = Matches(
    r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}",
    '{key}="{value}" names no folder; use letters, digits, dots, dashes and underscores, no dot '
    "first, 200 characters at most",
)
NOT_EMPTY = Matches(r"(?s).+", '{key}="{value}" is no folder; give one like {key}=runs')
# torch's generators take a signed 64-bit seed.
BELOW_2_63 = Law(
    lambda value: value < 2**63, "{key}={value} is too large; use one below 2**63", "< 2^63"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One run. Changing a *training* key opens a lineage; *operational* keys may change at any
    restart."""

    name: Annotated[str, FOLDER_NAME, OPERATIONAL] = "opt"
    """The run's folder under `runs`: letters, digits, dots, dashes and underscores."""
    runs: Annotated[str, NOT_EMPTY, OPERATIONAL] = "runs"
    """Folder of run directories."""
    seed: Annotated[int, NOT_NEGATIVE, BELOW_2_63, TRAINING] = 0
    """Of the initial weights, the sample order and dropout."""
    lineage: Annotated[str, Choices("", "new"), OPERATIONAL] = ""
    """``new``: go on from the newest checkpoint under changed training keys."""
    ledger: Annotated[str, OPERATIONAL] = ""
    """A run, by directory or name: a new run trains from the start under its ledger."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    burn_in: BurnInConfig = field(default_factory=BurnInConfig)
    stability: StabilityConfig = field(default_factory=StabilityConfig)
    supervisor: SupervisorConfig = field(default_factory=SupervisorConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    sinks: SinksConfig = field(default_factory=SinksConfig)

    @property
    def run_path(self) -> Path:
        """Of the run directory."""
        return Path(self.runs, self.name)

    @property
    def world_size(self) -> int:
        return self.cluster.nodes * self.cluster.slots_per_node


def to_json(config: RunConfig) -> str:
    """The resolved configuration as JSON, the same bytes for the same values."""
    # Sorted: the hash of these bytes tells a rank that it reads the file that the supervisor meant.
    return json.dumps(asdict(config), indent=2, sort_keys=True) + "\n"


def sha256_of(config: RunConfig) -> str:
    """Hash of `to_json`: what `Begin.config_sha256` carries."""
    return hashlib.sha256(to_json(config).encode()).hexdigest()


def from_json(path: Path) -> RunConfig:
    """The configuration that `to_json` wrote to `path`.

    Raises:
        OSError, ValueError: the file cannot be read, or is no JSON.
        BadInput: a key is unknown or its value of another type.
    """
    # Names and types, no laws: they were asked when the run began, and one that came since must not
    # lock it out of its own directory.
    return build(RunConfig, json.loads(path.read_text()))
