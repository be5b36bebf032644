"""What a host grants is tried, and what cannot be tried is unknown."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from opt_train.burn_in import host_powers
from opt_train.burn_in.site_power import Granted
from tests.command import Said


@pytest.mark.parametrize(("scope", "granted"), [("0", "yes"), ("1", "no"), (None, "yes")])
def test_ptrace_is_as_yama_says(
    scope: str | None, granted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if scope is not None:
        (tmp_path / "scope").write_text(f"{scope}\n")
    monkeypatch.setattr(host_powers, "PTRACE_SCOPE", tmp_path / "scope")
    assert host_powers.stacks().granted == granted


@pytest.mark.parametrize(
    ("program", "granted", "found"),
    [
        ("print(8)", "yes", "8 GPUs"),
        ("print(0)", "no", "NVML shows no GPU"),
        ("raise ImportError('no libnvidia-ml')", "no", "no libnvidia-ml"),
        ("import time; time.sleep(100)", "unknown", "has not answered"),
    ],
)
def test_nvml_is_asked_in_a_child_that_may_hang(
    program: str, granted: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_powers, "PROBE_GPUS", program)
    monkeypatch.setattr(host_powers, "ANSWER_SECONDS", 2.0)
    power = host_powers.gpus()
    assert (power.granted, found in power.found) == (granted, True)


def test_a_folder_that_is_not_there_yet_is_judged_by_the_one_above(tmp_path: Path) -> None:
    power = host_powers.space(tmp_path / "runs" / "later")
    assert power.granted == Granted.YES
    assert f"{tmp_path}: " in power.found


def test_what_is_no_answer_is_an_error() -> None:
    with pytest.raises(ValueError, match="no answer"):
        host_powers.powers_in("hello\n")


def test_a_site_is_asked_through_the_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, say: Callable[..., Said]
) -> None:
    monkeypatch.chdir(tmp_path)
    # No Slurm may be found here, whatever this machine has.
    monkeypatch.setenv("PATH", str(tmp_path))
    said = say("preflight", "--site", "--json", "cluster=local")
    assert said.code == 0, said.err
    powers = {power["power"]: power for power in json.loads(said.out)}
    assert powers["Slurm"]["granted"] == "no"
    assert {"read the kernel log", "NVML with events", "ptrace", "free of a quota"} <= set(powers)
    assert all(power["found"] and power["then"] for power in powers.values())
