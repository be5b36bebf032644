"""What a program reads must have one shape, and say of which configuration each plan is."""

import json
from typing import Any

import pytest

from opt_train.cli import main as cli


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    cli.main(["plan", "--json", *words])
    return json.loads(capsys.readouterr().out)


def test_a_multirun_of_one_is_a_list_too(capsys: pytest.CaptureFixture[str]) -> None:
    (only,) = printed(capsys, "--multirun", "experiment=glob(opt-175*)")
    assert only == printed(capsys, "experiment=opt-175b")


def test_a_sweep_over_precision_says_which_is_which(capsys: pytest.CaptureFixture[str]) -> None:
    plans = printed(capsys, "-m", "experiment=opt-125m", "precision=bf16,fp16-memory-efficient")
    assert [plan["precision"] for plan in plans] == [
        {"compute": "bf16", "weights": "fp32"},
        {"compute": "fp16", "weights": "fp16"},
    ]
