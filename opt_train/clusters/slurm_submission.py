"""The batch script of a run's supervisor: `launch/supervisor.sbatch`, with the site's options and
the run's arguments filled in, for a person to read."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from opt_logbook.record.run_directory import RunDirectory

from opt_train.clusters import slurm_commands as slurm
from opt_train.clusters.config import ClusterConfig, SlurmConfig
from opt_train.protocol.exits import BadInput

TEMPLATE = "supervisor.sbatch"


def launch_directory() -> Path:
    """The packaged launch scripts: inside the installed package, or beside it in a checkout.

    Raises:
        BadInput: neither is there, so the installation is broken.
    """
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "launch", package.parent / "launch"):
        if (candidate / TEMPLATE).is_file():
            return candidate
    raise BadInput(
        f"{package / 'launch'} is missing from the installation; install opt-train again"
    )


class SlurmSubmission:
    """The supervisor's job of a run."""

    def __init__(self, run: RunDirectory, config: ClusterConfig) -> None:
        self._run, self._config = run, config.slurm

    def script(self, program: str, arguments: Sequence[str]) -> str:
        name = f"opt-train-{self._run.path.name}"
        output = self._run.submit / "supervisor-%j.log"
        return supervisor_script(self._config, name, output, program, arguments)

    def submit(self, script: str) -> tuple[str, Path]:
        path = self._run.submit / TEMPLATE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(script)
        try:
            number = slurm.ask("sbatch", "--parsable", f"--chdir={Path.cwd()}", str(path))
        except slurm.SlurmError as error:
            raise BadInput(f"Slurm refuses {path} ({error}); change cluster.slurm.*") from None
        job = number.strip().partition(";")[0]
        return job, path.with_name(f"supervisor-{job}.log")


def supervisor_script(
    config: SlurmConfig, name: str, output: Path, program: str, arguments: Sequence[str]
) -> str:
    """The script that `sbatch` takes.

    Args:
        name: of the job.
        output: where its log goes; ``%j`` is the job's number.
        program: path of `opt-train`.
        arguments: of `opt-train run`, beside ``cluster=slurm``.
    """
    given = {"job-name": name, "output": str(output), **site_options(config)}
    lines = []
    for line in (launch_directory() / TEMPLATE).read_text().splitlines():
        option = line.removeprefix("#SBATCH --").partition("=")[0]
        if line.startswith("#SBATCH --") and option in given:
            lines.append(_directive(option, given.pop(option)))
        elif line.startswith("set -euo"):
            lines += [line, f"OPT_TRAIN={shlex.quote(program)}"]
            lines += [f"set -- {shlex.join(arguments)}"] if arguments else []
        else:
            lines.append(line)
    last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    extra = [_directive(option, value) for option, value in given.items()]
    extra += [f"#SBATCH {shlex.quote(word)}" for word in shlex.split(config.supervisor_options)]
    return "\n".join([*lines[: last + 1], *extra, *lines[last + 1 :], ""])


def site_options(config: SlurmConfig) -> dict[str, str]:
    """Option -> value, for the supervisor's job."""
    options = {
        "account": config.account,
        "partition": config.supervisor_partition or config.partition,
        "qos": config.qos,
        "reservation": config.reservation,
        "time": config.supervisor_time_limit,
    }
    return {option: value for option, value in options.items() if value}


def _directive(option: str, value: str) -> str:
    # sbatch reads a directive as a shell would read words, up to a comment: quotes hold both off.
    return f"#SBATCH --{option}={shlex.quote(value)}"
