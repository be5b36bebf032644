"""`opt-train intervene`: change what a run trains with, while it trains."""

import argparse
from collections.abc import Mapping

from opt_logbook.record import inbox

from opt_train.cli.person import user_and_host
from opt_train.cli.requests.ways import check_obeys_requests, needs_other_way
from opt_train.protocol.exits import DONE, BadInput
from opt_train.protocol.interventions import CHANGES, INTERVENE, ROLL_BACK, changes_of
from opt_train.run.report.run_report import RunReport, report_of


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "changes",
        nargs="+",
        metavar="NAME=VALUE",
        help="; ".join(f"{name}: {change.what}" for name, change in CHANGES.items()),
    )
    parser.add_argument(
        "--why", required=True, metavar="TEXT", help="the reason, which the chronicle tells"
    )


def run(flags: argparse.Namespace) -> int:
    """Ask the supervisor of the run at `flags.run` to give the orders.

    Raises:
        BadInput: a change is none, or nobody leads the run.
    """
    changes = changes_of(flags.changes)
    why = " ".join(flags.why.split())
    if not why:
        raise BadInput("--why is empty; say why, for whoever reads the chronicle")
    report = report_of(flags.run)
    if report.leadership.holder is None:
        raise BadInput(f"nobody leads {report.name}, so nothing can be changed: {report.headline}")
    check_obeys_requests(report)
    # The supervisor would drop it, and whoever asked would wait for a step that never comes.
    if not report.state.takes_orders:
        raise BadInput(
            f"{report.name} trains no step any more on which it could hold: {report.headline}"
        )
    if (under_way := report.state.rollback) is not None and ROLL_BACK in changes:
        raise BadInput(
            f"{report.name} is about to go back to step {under_way.step}; wait until it has"
        )
    _check_has_scale(report, changes)
    words = _in_words(report, changes)
    message = {"kind": INTERVENE, "by": user_and_host(), "why": why, "changes": changes}
    with needs_other_way(report):
        inbox.drop(report.run, message)
    print(
        f"asked {report.name} {words}; "
        f"the chronicle and `opt-train status {report.run.path}` tell when they do"
    )
    if silence := report.silence:
        print(silence)
    return DONE


def _check_has_scale(report: RunReport, changes: Mapping[str, float]) -> None:
    """
    Raises:
        BadInput: a loss scale is to be changed of a run that has none.
    """
    asked = [name for name in changes if CHANGES[name].of_loss_scale]
    config = report.config
    if asked and config is not None and config.precision.compute != "fp16":
        raise BadInput(
            f"{report.name} trains in {config.precision.compute}, which has no loss scale; "
            f"leave {asked[0]} out"
        )


def _in_words(report: RunReport, changes: Mapping[str, float]) -> str:
    """What is asked of the run.

    Raises:
        BadInput: there is nothing to go back to.
    """
    lasting = [f"{name}={value:g}" for name, value in changes.items() if name != ROLL_BACK]
    what = f"to train with {', '.join(lasting)}"
    if ROLL_BACK not in changes:
        return f"{what} from the next step that its ranks agree on"
    step = int(changes[ROLL_BACK])
    target = report.state.rollback_target(step)
    if target is None:
        raise BadInput(
            f"{report.name} has no good state at or before step {step}; "
            f"`opt-train checkpoints {report.run.path}` lists those it has"
        )
    back = f"to go back to step {target.step}"
    return f"{back}, and {what} from there on" if lasting else back
