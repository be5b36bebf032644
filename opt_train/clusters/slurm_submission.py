"""The batch script of a run's supervisor: `launch/supervisor.sbatch`, or `launch/inside.sbatch`
where the supervisor runs on the nodes themselves, with the site's options and the run's arguments
filled in, for a person to read."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from opt_logbook.record.run_directory import RunDirectory

from opt_train.clusters import slurm_commands as slurm
from opt_train.clusters.config import ClusterConfig, SlurmConfig
from opt_train.clusters.slurm_allocation import (
    INSIDE,
    SUPERVISOR,
    allocation_name,
    allocation_options,
    launch_directory,
    site_words,
    submit_script,
    supervisor_name,
    wanted_nodes,
)
from opt_train.protocol.exits import BadInput


class SlurmSubmission:
    """The supervisor's job of a run."""

    def __init__(self, run: RunDirectory, config: ClusterConfig) -> None:
        self._run, self._config = run, config
        self._template = INSIDE if config.slurm.holder == "inside" else SUPERVISOR

    def script(self, program: str, arguments: Sequence[str]) -> str:
        # Paths of the run's arguments are meant from here, also when it is submitted again.
        output = {
            "output": str(self._run.submit / "supervisor-%j.log"),
            "chdir": str(Path.cwd()),
        }
        if self._template == SUPERVISOR:
            own = {"job-name": supervisor_name(self._run)}
            options = {**own, **output, **supervisor_options(self._config.slurm)}
            words = shlex.split(self._config.slurm.supervisor_options)
            return filled_script(SUPERVISOR, options, words, program, arguments)
        options = allocation_options(self._run, self._config, allocation_name(self._run))
        options |= {"nodes": wanted_nodes(self._config), **output}
        # The template's own way to ask for GPUs is replaced by the site's.
        # --exclusive stands in the template, with its comment.
        words = [word for word in site_words(self._config) if word != "--exclusive"]
        return filled_script(INSIDE, options, words, program, arguments, dropped="gpus-per-node")

    def submit(self, script: str) -> tuple[str, Path]:
        path = self._run.submit / self._template
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(script)
        try:
            job = submit_script(path)
        except slurm.SlurmError as error:
            raise BadInput(f"Slurm refuses {path} ({error}); change cluster.slurm.*") from None
        return job, path.with_name(f"supervisor-{job}.log")


def filled_script(
    template: str,
    options: Mapping[str, str],
    words: Sequence[str],
    program: str,
    arguments: Sequence[str],
    dropped: str = "",
) -> str:
    """The script that `sbatch` takes.

    Args:
        template: of `launch/`.
        options: of the job; they replace the template's of the same name.
        words: further options, each as it is.
        program: path of `opt-train`.
        arguments: of `opt-train run`.
        dropped: the option of the template that is left out.
    """
    given = dict(options)
    lines = []
    for line in (launch_directory() / template).read_text().splitlines():
        option = line.removeprefix("#SBATCH --").partition("=")[0]
        if line.startswith("#SBATCH --") and option in given:
            lines.append(_directive(option, given.pop(option)))
        elif line.startswith("#SBATCH --") and option == dropped:
            continue
        elif line.startswith("set -euo"):
            lines += [line, f"OPT_TRAIN={shlex.quote(program)}"]
            lines += [f"set -- {shlex.join(arguments)}"] if arguments else []
        else:
            lines.append(line)
    last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    extra = [_directive(option, value) for option, value in given.items()]
    extra += [f"#SBATCH {shlex.quote(word)}" for word in words]
    return "\n".join([*lines[: last + 1], *extra, *lines[last + 1 :], ""])


def supervisor_options(config: SlurmConfig) -> dict[str, str]:
    """Option -> value, for a supervisor's job of its own."""
    options = {
        "account": config.account,
        "partition": config.supervisor_partition or config.partition,
        "qos": config.qos,
        "reservation": config.reservation,
        "time": config.supervisor_time_limit,
    }
    return {option: value for option, value in options.items() if value}


def _directive(option: str, value: str) -> str:
    if "\n" in value:  # no quote keeps it out of the script's commands
        raise BadInput(f"{option}={value!r} has a line break, which no batch script can hold")
    # sbatch reads a directive as a shell would read words, up to a comment: quotes hold both off.
    return f"#SBATCH --{option}={shlex.quote(value)}"
