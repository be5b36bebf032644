"""The configuration of a run: every room's dataclass in one, checked across rooms. The only file that imports Hydra."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from opt_train.checkpoint.config import CheckpointConfig
from opt_train.data.config import DataConfig, TokenizerConfig
from opt_train.model.config import ModelConfig
from opt_train.optim.config import OptimConfig
from opt_train.parallel.config import ParallelConfig, PrecisionConfig
from opt_train.supervisor.config import ClusterConfig, FaultsConfig, SupervisorConfig
from opt_train.train.config import TrainConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One run. Changing a *training* key opens a lineage; *operational* keys may change at any restart."""

    name: str = "opt"
    runs: str = "runs"
    """Folder of run directories."""
    seed: int = 0
    lineage: str = ""
    """``new``: go on from the newest checkpoint under changed training keys."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    supervisor: SupervisorConfig = field(default_factory=SupervisorConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)

    @property
    def world_size(self) -> int:
        return self.cluster.nodes * self.cluster.slots_per_node


def to_json(config: RunConfig) -> str:
    """The resolved configuration as JSON, the same bytes for the same values."""
    return json.dumps(asdict(config), indent=2, sort_keys=True) + "\n"


def sha256_of(config: RunConfig) -> str:
    """Hash of `to_json`: what `Begin.config_sha256` carries."""
    return hashlib.sha256(to_json(config).encode()).hexdigest()


def from_json(path: Path) -> RunConfig:
    """The configuration that `to_json` wrote to `path`."""
    values: dict[str, Any] = json.loads(path.read_text())
    rooms = {f.name: f.default_factory for f in fields(RunConfig) if callable(f.default_factory)}
    return RunConfig(**{k: rooms[k](**v) if k in rooms else v for k, v in values.items()})
