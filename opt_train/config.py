"""The configuration of a run: every room's dataclass in one, checked across rooms. The only file that imports Hydra.

Hydra composes YAML groups over the dataclasses' defaults; the builder here makes the frozen dataclasses of the result,
strictly, because a value of the wrong type must be a sentence now and not a crash at three in the morning. Hydra is
imported where it is used: a rank reads the resolved JSON and never pays for it.
"""

import difflib
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, get_type_hints

from opt_train.checkpoint.config import CheckpointConfig
from opt_train.config_checks import check
from opt_train.data.config import DataConfig, TokenizerConfig
from opt_train.model.config import ModelConfig
from opt_train.optim.config import OptimConfig
from opt_train.parallel.config import ParallelConfig, PrecisionConfig
from opt_train.protocol.exits import BadInput
from opt_train.sinks.config import SinksConfig
from opt_train.supervisor.config import ClusterConfig, FaultsConfig, SupervisorConfig
from opt_train.train.config import TrainConfig

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

Room = TypeVar("Room")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One run. Changing a *training* key opens a lineage; *operational* keys may change at any restart."""

    name: str = "opt"
    """The run's folder under `runs`: letters, digits, dots, dashes and underscores."""
    runs: str = "runs"
    """Folder of run directories."""
    seed: int = 0
    """Of the initial weights, the sample order and dropout."""
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
    sinks: SinksConfig = field(default_factory=SinksConfig)

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
    """The configuration that `to_json` wrote to `path`.

    Raises:
        OSError, ValueError: the file cannot be read, or is no JSON.
        BadInput: a key is unknown or its value of another type.
    """
    return build(RunConfig, json.loads(path.read_text()))


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML, in the order of the dataclasses: what `--cfg job` prints."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


# Fixed, training and operational keys -------------------------------------------------------------------------

FIXED = (
    "model.layers",
    "model.heads",
    "model.d_model",
    "model.ffn",
    "model.layer_norm",
    "model.embed_dim",
    "model.vocab_size",
    "model.positions",
    "data.corpus",
    "data.max_bytes",
    "data.validation_fraction",
    "data.sequence_length",
    "tokenizer",
    "precision.weights",
    "train.global_batch",
    "train.initial_weights",
)
"""Keys, and rooms, that no lineage changes: the run's checkpoints would not fit the model, nor its cursor the data."""

OPERATIONAL = (
    "name",
    "runs",
    "lineage",
    "data.name",
    "data.directory",
    "data.validation_sets",
    "data.shard_tokens",
    "parallel",
    "optim.fused",
    "train.micro_batch",
    "train.validate_every",
    "train.validate_sets_every",
    "train.layer_norms_every",
    "train.attention_logit_every",
    "train.speed_probe_every",
    "train.device",
    "train.threads",
    "train.collective_timeout_seconds",
    "train.deterministic",
    "checkpoint",
    "cluster",
    "supervisor",
    "faults",
    "sinks",
)
"""Keys, and rooms, that may change between attempts: where and how the work is done. Every key that is neither fixed
nor operational is a *training* key: it decides what is computed, and changing it opens a lineage."""


def kind_of(key: str) -> str:
    """``fixed`` for the life of a run, ``training`` or ``operational``: what a change of the dotted `key` does."""
    for kind, entries in (("fixed", FIXED), ("operational", OPERATIONAL)):
        if any(key == entry or key.startswith(entry + ".") for entry in entries):
            return kind
    return "training"


def flatten(config: RunConfig) -> dict[str, Any]:
    """Every key of the configuration, dotted, with its value, in the order of the dataclasses."""
    flat: dict[str, Any] = {}
    for name, value in asdict(config).items():
        flat.update({f"{name}.{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {name: value})
    return flat


class Difference(NamedTuple):
    """What changed between two configurations, by the kind of key, each as `key: old -> new`."""

    fixed: tuple[str, ...]
    training: tuple[str, ...]
    operational: tuple[str, ...]


def difference(old: RunConfig, new: RunConfig) -> Difference:
    """What changed from `old` to `new`. `lineage` is a request, not a value."""
    before, after = flatten(old), flatten(new)
    lines: dict[str, list[str]] = {kind: [] for kind in Difference._fields}
    for key in after:
        if before[key] != after[key] and key != "lineage":
            lines[kind_of(key)].append(f"{key}: {_shown(before[key])} -> {_shown(after[key])}")
    return Difference(**{kind: tuple(changes) for kind, changes in lines.items()})


def _shown(value: object) -> str:
    return '""' if value == "" else str(value)


# Composition --------------------------------------------------------------------------------------------------


def configs_directory() -> Path:
    """The packaged groups: inside the installed package, or beside it in a checkout.

    Raises:
        BadInput: neither is there, so the installation is broken.
    """
    package = Path(__file__).resolve().parent
    for candidate in (package / "configs", package.parent / "configs"):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise BadInput(f"{package / 'configs'} is missing from the installation; install opt-train again")


def compose(overrides: Sequence[str], config_directory: Path | None = None) -> RunConfig:
    """The configuration that Hydra overrides such as `model=tiny optim.lr=3e-4` ask for.

    Args:
        overrides: Hydra's grammar, without sweeps.
        config_directory: a user's own folder of groups; it adds choices to the packaged ones.

    Raises:
        BadInput: a key, group or value is unknown or of the wrong type, or the rooms do not fit one another.
    """
    import yaml
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    directories = _directories(config_directory)
    for override in _parsed(overrides):
        _check_override(override, directories)
    ConfigStore.instance().store(name="base", node=asdict(RunConfig()))
    # A folder added by `hydra.searchpath` comes after the packaged one, exactly as with Hydra's own `--config-dir`.
    search = [f"hydra.searchpath={json.dumps(['file://' + str(d) for d in directories[1:]])}"]
    try:
        with initialize_config_dir(str(directories[0]), version_base="1.3"):
            composed = hydra_compose("config", overrides=[*search, *overrides])
            values = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"the configuration does not compose: {_one_line(error)}") from None
    config = build(RunConfig, values)
    check(config)
    return config


def expand(overrides: Sequence[str], config_directory: Path | None = None) -> list[list[str]]:
    """The jobs of a multirun, as Hydra's basic sweeper makes them: the cross product of all sweeps, last one fastest.

    Sweeps are `key=a,b`, `key=choice(a,b)`, `key=range(1,4)` and, for groups, `group=glob(opt-*)`.

    Raises:
        BadInput: an override cannot be read, or sweeps over an interval, which has no list of values.
    """
    from hydra.core.override_parser.types import Glob

    axes: list[list[str]] = []
    for override in _parsed(overrides):
        key = override.get_key_element()
        swept = override.value()
        if isinstance(swept, Glob):
            choices = _choices(override.key_or_group, _directories(config_directory))
            matching = [choice for choice in choices if _matches(choice, swept.include, swept.exclude)]
            if not matching:
                known = f"choose from {', '.join(choices)}" if choices else f"{key} is no group of choices"
                raise BadInput(f"{override.input_line} matches nothing; {known}")
            axes.append([f"{key}={choice}" for choice in matching])
        elif override.is_discrete_sweep():
            try:
                axes.append([f"{key}={value}" for value in override.sweep_string_iterator()])
            except ValueError:
                raise BadInput(f"{override.input_line} names no values; give a step that is not 0") from None
        elif override.is_sweep_override():
            raise BadInput(f"{key} sweeps over an interval, which has no end of values; list them: {key}=1,2,3")
        else:
            axes.append([f"{key}={override.get_value_element_as_str()}"])
    return [list(job) for job in itertools.product(*axes)]


def _matches(choice: str, include: Iterable[str], exclude: Iterable[str]) -> bool:
    return any(fnmatch(choice, p) for p in include) and not any(fnmatch(choice, p) for p in exclude)


def _directories(config_directory: Path | None) -> list[Path]:
    """Where groups are looked up, in this order."""
    if config_directory is None:
        return [configs_directory()]
    if not config_directory.is_dir():
        raise BadInput(
            f"--config-dir={config_directory} is not a folder; give one that holds groups, as model/mine.yaml"
        )
    return [configs_directory(), config_directory.resolve()]


def _choices(group: str, directories: Sequence[Path]) -> list[str]:
    """The choices of `group`; empty when there is no such group."""
    return sorted({path.stem for directory in directories for path in (directory / group).glob("*.yaml")})


def _parsed(overrides: Sequence[str]) -> list["Override"]:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        try:
            parsed.append(parser.parse_override(text))
        except HydraException:
            raise BadInput(
                f"{text!r} is not key=value; write model=tiny or optim.lr=3e-4, "
                "and double quotes around a value with spaces, brackets or =: 'data.corpus=\"my text\"'"
            ) from None
    return parsed


def _check_override(override: "Override", directories: Sequence[Path]) -> None:
    """One sentence for what Hydra would say in five lines, before Hydra sees it."""
    key = override.key_or_group
    value = override.value()
    if override.is_sweep_override():
        _, _, text = (override.input_line or "").partition("=")
        raise BadInput(
            f"{key}={text} is a list of values; give --multirun to try each, or quote it: '{key}=\"{text}\"'"
        )
    if override.is_add() or override.is_force_add() or override.is_delete():
        raise BadInput(f"{override.input_line} adds or removes a key, but all keys are known; write {key}=VALUE")
    keys = flatten(RunConfig())
    groups = sorted(p.name for directory in directories for p in directory.iterdir() if p.is_dir())
    if override.package is not None or (key not in keys and key not in groups):
        raise BadInput(f"{override.get_key_element()} is no configuration key{_nearest(key, [*keys, *groups])}")
    if key in groups:
        for choice in value if isinstance(value, list) else [value]:
            if str(choice) not in _choices(key, directories):
                raise BadInput(f"{key}={choice} does not exist{_nearest(str(choice), _choices(key, directories))}")


def _one_line(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())


def _nearest(word: str, candidates: Sequence[str]) -> str:
    """`; did you mean ...?` with the nearest candidate, or where to look them up."""
    near = difflib.get_close_matches(word, candidates, n=1, cutoff=0.5)
    if not near:  # the right name in the wrong room: lr for optim.lr
        near = [c for c in candidates if c.rpartition(".")[2] == word.rpartition(".")[2]][:1]
    if near:
        return f"; did you mean {near[0]}?"
    if len(candidates) <= 12:
        return f"; choose from {', '.join(candidates)}"
    return "; `opt-train run --cfg job` prints them all"


# The builder --------------------------------------------------------------------------------------------------

_KINDS: dict[type, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
}


def build(cls: type[Room], values: Any, prefix: str = "") -> Room:
    """The dataclass `cls` from a mapping, checked field by field; what is missing keeps its default.

    Raises:
        BadInput: a name is unknown or a value has another type (an int does for a float; nothing else converts).
    """
    assert is_dataclass(cls)
    if not isinstance(values, Mapping):
        raise BadInput(
            f"{prefix.rstrip('.')}={values} is not a group of keys; set its keys one by one, as {prefix}KEY=VALUE"
        )
    hints = get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}
    made: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in known:
            raise BadInput(f"{key} is no configuration key{_nearest(key, [prefix + k for k in known])}")
        if is_dataclass(hints[name]):
            made[name] = build(hints[name], value, f"{key}.")
        else:
            made[name] = _typed(key, value, hints[name], known[name].default)
    result: Room = cls(**made)
    return result


def _typed(key: str, value: object, kind: type, default: object) -> object:
    """`value` as `kind`, or the sentence that says what would do."""
    if kind is float and type(value) is int:
        try:
            value = float(value)
        except OverflowError:
            raise BadInput(f"{key} is too large a number; give one like {_example(kind, default)}") from None
    if type(value) is not kind:
        if kind is str:
            raise BadInput(f"{key}={_shown(value)} is not text; put it in quotes: '{key}=\"{value}\"'")
        raise BadInput(f"{key}={_shown(value)} is not {_KINDS[kind]}; give one like {_example(kind, default)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise BadInput(f"{key}={value} is not a finite number; give one like {_example(kind, default)}")
    return value


def _example(kind: type, default: object) -> str:
    # 6e-4 reads better than 0.0006.
    if kind is float and isinstance(default, float) and 0 < abs(default) < 0.01:
        mantissa, _, exponent = f"{default:e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    if default is MISSING or isinstance(default, bool):
        return "true" if kind is bool else "1"
    return f"{default:g}" if isinstance(default, float) else str(default)
