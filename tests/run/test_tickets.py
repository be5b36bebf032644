"""A ticket names node, GPU, counter, time, and what is asked."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from opt_logbook.record.events import (
    Entry,
    Event,
    Evidence,
    FindingNoted,
    IncidentDiagnosed,
    NodeFailed,
)
from opt_logbook.record.hardware import GpuIdentity
from opt_logbook.record.node_events import LemonCleared, LemonNoted

from opt_train.diagnosis.causes import LABELS
from opt_train.run.report.tickets import tickets
from tests.command import Said

KEPT = Path(__file__).resolve().parents[1] / "data" / "run_of_154853f" / "run"
COUNTER = Evidence("nvml", 0, "GPU 0 (GPU-a): volatile uncorrectable ECC errors 0 -> 1")


def entries(*events: Event) -> list[Entry]:
    return [Entry(1795000000.0 + n, "1.00", 7, event) for n, event in enumerate(events)]


def diagnosed(incident: int, cause: str, detail: str, node: str, *evidence: Evidence) -> Event:
    return IncidentDiagnosed(incident, cause, "hardware", detail, 0.9, node, -1, evidence, "")


def found(
    node: str, cause: str, detail: str, *evidence: Evidence, gpu: GpuIdentity | None = None
) -> Event:
    return FindingNoted(node, cause, "hardware", detail, True, 0.9, evidence, "", "act", "", gpu)


def test_a_bad_gpu_is_named_with_its_counter() -> None:
    [ticket] = tickets(
        entries(
            diagnosed(1, "gpu_ecc", "uncontained", "n1", COUNTER), NodeFailed("n1", 1, "gpu_ecc")
        )
    )
    assert ticket.text("night") == (
        "n1: gpu_ecc (uncontained)\n"
        "  taken out of run night at 2026-11-18 11:06:41 UTC, after step 7 of 1.00\n"
        "  seen: nvml: GPU 0 (GPU-a): volatile uncorrectable ECC errors 0 -> 1\n"
        "  asked: Reset the GPU, run its memory test, and watch it."
    )


def test_the_admin_reads_which_board_it_is() -> None:
    """A rack has dozens of them: the index in the node is none of the words on the label."""
    gpu = GpuIdentity(2, "GPU-a", "1322521", "00000000:3B:00.0")
    [ticket] = tickets(
        entries(
            found("n1", "gpu_ecc", "uncontained", COUNTER, gpu=gpu),
            diagnosed(1, "gpu_ecc", "uncontained", "n1", COUNTER),
            NodeFailed("n1", 1, "gpu_ecc"),
        )
    )
    assert ticket.text("night").splitlines()[2] == (
        "  which: GPU 2, UUID GPU-a, serial number 1322521, PCI address 00000000:3B:00.0"
    )


def test_a_board_without_a_serial_number_has_none_in_its_ticket() -> None:
    [ticket] = tickets(
        entries(
            found("n1", "gpu_lost", "lost", gpu=GpuIdentity(0, "GPU-b", pci="00000000:18:00.0")),
            found("n1", "preemption", "drain"),
            NodeFailed("n1", 0, "gpu_lost"),
        )
    )
    assert "  which: GPU 0, UUID GPU-b, PCI address 00000000:18:00.0\n" in ticket.text("night")


def test_a_ticket_says_what_a_repeat_offender_has_done_before() -> None:
    why = "3 x gpu_ecc (uncontained) in 20 days, in runs a, b"
    made = tickets(
        entries(
            LemonNoted("n1", 2.4, why, ()),
            NodeFailed("n1", 0, "gpu_ecc"),
            LemonNoted("n2", 2.4, why, ()),
            LemonCleared("n2", 0.9),
            NodeFailed("n2", 0, "gpu_ecc"),
        )
    )
    assert f"  repeat offender: {why}\n" in made[0].text("night")
    assert "repeat offender" not in made[1].text("night")


def test_a_planned_replacement_has_its_finding_and_another_nodes_incident_is_not_its_own() -> None:
    made = tickets(
        entries(
            diagnosed(1, "gpu_ecc", "uncontained", "n1", COUNTER),
            NodeFailed("n2", 1, "node_failure"),
            found("n3", "preemption", "drain", Evidence("cluster", 0, "drained: new DIMM")),
            NodeFailed("n3", 0, "preemption"),
        )
    )
    assert [(t.node, [e.text for e in t.evidence]) for t in made] == [
        ("n2", []),
        ("n3", ["drained: new DIMM"]),
    ]
    assert made[1].asked == "Nothing: you wanted the node back."


def test_every_cause_asks_for_something() -> None:
    for cause in (*LABELS, "of_a_newer_version"):
        [ticket] = tickets(entries(NodeFailed("n1", 0, cause)))
        assert ticket.asked.endswith(".")


def test_the_verb_prints_one_for_each_node_of_a_real_run(
    tmp_path: Path, say: Callable[..., Said]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(KEPT, run)
    said = say("tickets", str(run))
    assert said.code == 0
    listed = json.loads(say("tickets", str(run), "--json").out)
    assert said.out.count("  asked: ") == len(listed) >= 1
    assert all(ticket["node"].startswith("node-") for ticket in listed)
