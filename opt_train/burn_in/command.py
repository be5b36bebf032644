"""The command lines of the test programs; nothing here imports torch."""

import sys
from pathlib import Path


def node_command(run: Path, node: str) -> list[str]:
    """Test `node`, on which this is started, as the configuration in the run directory says."""
    return [*_module("node"), "--run", str(run), "--node", node]


def pair_command(run: Path, node: str, other: str, meeting: str, first: bool) -> list[str]:
    """Reduce with `other`, on which the same is started. `meeting` names what both take part in;
    one of them is the `first`."""
    words = ["--run", str(run), "--node", node, "--other", other, "--meeting", meeting]
    return [*_module("pair"), *words, *(["--first"] if first else [])]


def host_command(folder: Path) -> list[str]:
    """Say what the host on which this is started grants an ordinary user whose run directories lie
    in `folder`."""
    return [*_module("host_powers"), "--folder", str(folder)]


def _module(name: str) -> list[str]:
    # -P: no module of the working directory stands in for one of ours.
    return [sys.executable, "-P", "-m", f"opt_train.burn_in.{name}"]
