"""Composition of a run's configuration from YAML groups and overrides. The only file that imports
Hydra.

Hydra composes the groups over the dataclasses' defaults; `builder` makes the frozen dataclasses of
the result, strictly, because a value of the wrong type must be a sentence now and not a crash at
three in the morning. `hydra.main` is not used: it exits 1 for a mistake, prints a traceback and
litters a folder `outputs/`. Hydra is imported where it is used, so that `--help` answers at once.
"""

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from opt_train.config.builder import build
from opt_train.config.checks import check
from opt_train.config.difference import flatten
from opt_train.config.run_config import RunConfig
from opt_train.config.sentences import did_you_mean
from opt_train.protocol.exits import BadInput

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML, in the order of the dataclasses: what `--cfg job`
    prints."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def configs_directory() -> Path:
    """The packaged groups: inside the installed package, or beside it in a checkout.

    Raises:
        BadInput: neither is there, so the installation is broken.
    """
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "configs", package.parent / "configs"):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise BadInput(
        f"{package / 'configs'} is missing from the installation; install opt-train again"
    )


def compose(overrides: Sequence[str], config_directory: Path | None = None) -> RunConfig:
    """The configuration that Hydra overrides such as `model=tiny optim.lr=3e-4` ask for.

    Args:
        overrides: Hydra's grammar, without sweeps.
        config_directory: a user's own folder of groups; it adds choices to the packaged ones.

    Raises:
        BadInput: a key, group or value is unknown or of the wrong type, or the rooms do not fit one
            another.
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
    # As a plain dict: Hydra takes no frozen dataclass as a structured config.
    ConfigStore.instance().store(name="base", node=asdict(RunConfig()))
    # A folder added by `hydra.searchpath` comes after the packaged one, exactly as with Hydra's own
    # `--config-dir`.
    search = [f"hydra.searchpath={json.dumps(['file://' + str(d) for d in directories[1:]])}"]
    try:
        # Without a version Hydra warns, and behaves as 1.1 did.
        with initialize_config_dir(str(directories[0]), version_base="1.3"):
            composed = hydra_compose("config", overrides=[*search, *overrides])
            values = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"the configuration does not compose: {_one_line(error)}") from None
    config = build(RunConfig, values)
    check(config)
    return config


def expand(overrides: Sequence[str], config_directory: Path | None = None) -> list[list[str]]:
    """The jobs of a multirun, as Hydra's basic sweeper makes them: the cross product of all sweeps,
    last one fastest.

    Sweeps are `key=a,b`, `key=choice(a,b)`, `key=range(1,4)` and, for groups, `group=glob(opt-*)`.

    Raises:
        BadInput: an override cannot be read, or sweeps over an interval, which has no list of
            values.
    """
    from hydra.core.override_parser.types import Glob

    axes: list[list[str]] = []
    for override in _parsed(overrides):
        key = override.get_key_element()
        swept = override.value()
        if isinstance(swept, Glob):
            choices = _choices(override.key_or_group, _directories(config_directory))
            matching = [
                choice for choice in choices if _matches(choice, swept.include, swept.exclude)
            ]
            if not matching:
                known = f"{key} is no group of choices"
                if choices:
                    known = f"choose from {', '.join(choices)}"
                raise BadInput(f"{override.input_line} matches nothing; {known}")
            axes.append([f"{key}={choice}" for choice in matching])
        elif override.is_discrete_sweep():
            try:
                axes.append([f"{key}={value}" for value in override.sweep_string_iterator()])
            except ValueError:
                raise BadInput(
                    f"{override.input_line} names no values; give a step that is not 0"
                ) from None
        elif override.is_sweep_override():
            raise BadInput(
                f"{key} sweeps over an interval, which has no end of values; list them: {key}=1,2,3"
            )
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
            f"--config-dir={config_directory} is not a folder; give one that holds groups, as "
            "model/mine.yaml"
        )
    return [configs_directory(), config_directory.resolve()]


def _choices(group: str, directories: Sequence[Path]) -> list[str]:
    """The choices of `group`; empty when there is no such group."""
    return sorted(
        {path.stem for directory in directories for path in (directory / group).glob("*.yaml")}
    )


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
                "and double quotes around a value with spaces, brackets or =: 'data.corpus=\"my "
                "text\"'"
            ) from None
    return parsed


def _check_override(override: "Override", directories: Sequence[Path]) -> None:
    """One sentence for what Hydra would say in five lines, before Hydra sees it."""
    key = override.key_or_group
    value = override.value()
    if override.is_sweep_override():
        _, _, text = (override.input_line or "").partition("=")
        raise BadInput(
            f"{key}={text} is a list of values; give --multirun to try each, or quote it: "
            f"'{key}=\"{text}\"'"
        )
    if override.is_add() or override.is_force_add() or override.is_delete():
        raise BadInput(
            f"{override.input_line} adds or removes a key, but all keys are known; write "
            f"{key}=VALUE"
        )
    # Our own lists of keys and groups, not Hydra's: they give the nearest name to a typing mistake.
    keys = flatten(RunConfig())
    groups = sorted(p.name for directory in directories for p in directory.iterdir() if p.is_dir())
    if override.package is not None or (key not in keys and key not in groups):
        raise BadInput(
            f"{override.get_key_element()} is no configuration "
            f"key{did_you_mean(key, [*keys, *groups])}"
        )
    if key in groups:
        for choice in value if isinstance(value, list) else [value]:
            if str(choice) not in _choices(key, directories):
                raise BadInput(
                    f"{key}={choice} does not "
                    f"exist{did_you_mean(str(choice), _choices(key, directories))}"
                )


def _one_line(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())
