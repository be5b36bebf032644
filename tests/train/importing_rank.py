"""The real rank, which says in its log what it imported between `Warm` and the end of its first
step."""

import json
import sys

from opt_train.protocol.facts import Phase, Warm
from opt_train.protocol.framing import Message
from opt_train.train import fact_pipe, warm

publish = fact_pipe.FactPipe.publish
KNOWN: set[str] = set()


def publish_and_compare(pipe: fact_pipe.FactPipe, fact: Message) -> None:
    publish(pipe, fact)
    if isinstance(fact, Warm):
        KNOWN.update(sys.modules)
    if isinstance(fact, Phase) and (fact.phase, fact.step) == (
        "data",
        1,
    ):  # the second step, counting from 0
        print("imported late: " + json.dumps(sorted(set(sys.modules) - KNOWN)), flush=True)


if __name__ == "__main__":
    fact_pipe.FactPipe.publish = publish_and_compare  # type: ignore[method-assign]
    warm.main()
