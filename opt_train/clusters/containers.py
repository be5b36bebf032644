"""The container in which a node's agent and its ranks run, where a site wants one.

Two programs are known. **pyxis** is a plugin of Slurm's that runs a step in an enroot container:
options of `srun` (https://github.com/NVIDIA/pyxis, ``args.c``). **apptainer** is a command in front
of the agent's (https://apptainer.org/docs/user/latest/cli/apptainer_exec.html). The agent starts
its ranks itself, so they are in the same container.

The image brings Python, torch and the other packages. `opt_train` itself comes from the lineage's
copy in the run directory, which is mounted at the path that it has outside, as is the data: every
path in a command or a manifest means the same file on both sides.

A container has none of Slurm's commands, so an agent in one cannot give its allocation back: it
leaves a file, and a step beside it, outside the container, does it (`clusters/slurm.py`).
"""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from opt_train.clusters.config import SlurmConfig
from opt_train.config.run_config import RunConfig
from opt_train.protocol.exits import BadInput

PYXIS, APPTAINER = "pyxis", "apptainer"


@dataclass(frozen=True, slots=True)
class Container:
    """How a step runs in a container; as made without arguments: in none."""

    srun_options: tuple[str, ...] = ()
    prefix: tuple[str, ...] = ()
    """In front of the command that runs inside."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """What `srun` must be started with, beside the variables that are to be seen inside."""
    python: str = sys.executable

    @property
    def hides_slurm(self) -> bool:
        """There are none of Slurm's commands inside."""
        return bool(self.srun_options or self.prefix)


def make_container(
    config: SlurmConfig, paths: Iterable[Path], variables: Mapping[str, str]
) -> Container:
    """The container that `cluster.slurm.container` asks for.

    Args:
        paths: what must be there inside, by the names that it has outside.
        variables: environment variables that the image must not replace by its own.
    """
    if not config.container:
        return Container()
    # Under its own name: a manifest, a command or a log line that names a file is right inside and
    # outside.
    mounts = [f"{path}:{path}" for path in paths]
    mounts += config.container_mounts.split(",") if config.container_mounts else []
    more = config.container_option_words
    if config.container == PYXIS:
        # A variable that the image sets too would keep the image's value.
        options = [f"--container-image={config.container_image}"]
        options += [f"--container-mounts={','.join(mounts)}"]
        options += [f"--container-env={','.join(variables)}", *more]
        return Container(tuple(options), (), {}, config.container_python)
    command = ["apptainer", "exec", f"--bind={','.join(mounts)}", *more, config.container_image]
    # As --env would, which takes no value with a comma in it.
    overriding = {f"APPTAINERENV_{name}": value for name, value in variables.items()}
    return Container((), tuple(command), overriding, config.container_python)


def mounted_paths(run: Path, config: RunConfig) -> list[Path]:
    """What a rank of `run` reads and writes: the run directory, the prepared data and the weights
    that it begins with; each once."""
    weights = config.train.initial_weights
    wanted = [run, Path(config.data.directory), *([Path(weights)] if weights else [])]
    # A mount below another one would hide what it is mounted on, to no purpose.
    return [path for path in dict.fromkeys(wanted) if not _is_below_any(path, wanted)]


def _is_below_any(path: Path, others: Iterable[Path]) -> bool:
    return any(path != other and path.is_relative_to(other) for other in others)


def check_container(config: SlurmConfig, paths: Iterable[Path]) -> None:
    """Refuse a container that could not be made.

    Raises:
        BadInput: it has no image, or one of `paths` has a name that no list of mounts can hold.
    """
    if not config.container:
        return
    if not config.container_image:
        raise BadInput(
            f"cluster.slurm.container={config.container} needs an image; give one, as "
            "cluster.slurm.container_image=/images/train.sqsh"
        )
    for path in paths:
        if {":", ","} & set(str(path)):
            raise BadInput(
                f"{path} cannot be mounted into a container, for the colon or comma in its name; "
                "choose another runs= or data.directory="
            )
