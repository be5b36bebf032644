"""The real rank, whose training goes wrong: `cluster.rank_module=benchmarks.stability.sick_rank`.

The environment has `SICK`, a JSON object: `sickness` (`sicknesses.inject`), `peer`
(`peers.put_in`), `odd_batches`, the numbers of single batches of garbage; and `SICK_FOLDER`, where
an event leaves a mark that it has happened.
"""

import json
import os

from opt_train.train import warm

import_everything = warm.import_everything


def main() -> None:
    """Be a warm rank that is sick."""
    from benchmarks.stability import peers, sicknesses  # noqa: PLC0415

    told = json.loads(os.environ["SICK"])
    sicknesses.inject(told.get("sickness", {}))
    peers.put_in(told.get("peer", ""))
    if odd := told.get("odd_batches"):
        sicknesses.poison_batches("garbage", lambda number: number in odd)
    warm.main()


if __name__ == "__main__":
    main()
