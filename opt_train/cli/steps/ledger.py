"""`opt-train ledger`: the lasting orders that a run trains under."""

import argparse
import json
from collections.abc import Iterator, Sequence
from typing import Any

from opt_logbook.story.format import printable

from opt_train.optim.in_force import in_force
from opt_train.protocol.exits import DONE
from opt_train.protocol.orders import LedgerEntry, UnknownOrder, parameters_of
from opt_train.run.ledger import to_json
from opt_train.run.report.run_report import RunReport, report_of

COLUMNS = ("behind step", "number", "order", "values", "why")


def run(flags: argparse.Namespace) -> int:
    """Print the ledger of the run at `flags.run`. Changes nothing.

    Raises:
        BadInput: there is no run, or it has not begun.
    """
    report = report_of(flags.run)
    created, ledger = report.created, report.state.ledger
    if flags.json:
        payload = {
            "name": report.name,
            "ledger_of": created.ledger_of,
            "ledger_difference": list(created.ledger_difference),
            "ledger": to_json(ledger),
            "step": report.step,
            "in_force": _in_force(report),
        }
        print(json.dumps(payload, indent=2))
        return DONE
    lines = list(_table(ledger)) if ledger else [f"{report.name}: no order is in its ledger"]
    if created.ledger_of:
        lines.append(f"{len(created.ledger)} of them were taken from {created.ledger_of}")
    if values := _in_force(report):
        pairs = ", ".join(f"{name} {value:g}" for name, value in values.items())
        lines.append(f"in force behind step {report.step:,}: {pairs}")
    print("\n".join(printable(line) for line in lines))
    return DONE


def _table(ledger: Sequence[LedgerEntry]) -> Iterator[str]:
    rows = [COLUMNS, *(_row(entry) for entry in ledger)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()


def _row(entry: LedgerEntry) -> tuple[str, ...]:
    order = entry.order
    values = ", ".join(f"{name}={value}" for name, value in parameters_of(order).items())
    name = order.name if isinstance(order, UnknownOrder) else order.kind
    return f"{entry.step:,}", str(order.number), name, values, order.reason


def _in_force(report: RunReport) -> dict[str, Any]:
    """The values that the next step is trained with; empty where this version cannot know them."""
    config = report.config
    try:
        return in_force(config, report.state.ledger, report.step) if config is not None else {}
    except ValueError:  # an order of a newer version
        return {}
