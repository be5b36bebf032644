"""``python -m opt_train.run.understood <CONFIG``: what agents and ranks of this code understand.

Asked of a lineage's copy by a supervisor of other code. It reads a configuration (exit code 2 and a
sentence: it cannot) and prints the signature of its messages, which the other one compares with its
own: one of them would refuse a message with a field that it does not know.
"""

import hashlib
import json
import sys
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

from opt_train.config.builder import build
from opt_train.config.run_config import RunConfig
from opt_train.link import handshake
from opt_train.protocol import commands, facts, orders
from opt_train.protocol.exits import BAD_INPUT, DONE, BadInput
from opt_train.protocol.framing import Message

MESSAGES = (facts, orders, commands)
"""Where the messages between a supervisor and its agents and ranks stand."""


def wire_signature() -> str:
    """Hash of every message's kind and fields, and of the handshake's version: the same for two
    codes that understand each other."""
    # The registry also holds what a plugin or a test has added, which the other end need not know.
    ours = {module.__name__ for module in MESSAGES}
    described = {
        kind: _described(message, ())
        for kind, message in Message.registry.items()
        if message.__module__ in ours
    }
    text = json.dumps([handshake.VERSION, described], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _described(kind: Any, above: tuple[Any, ...]) -> Any:
    """The shape of a field's type, dataclasses within it opened."""
    if is_dataclass(kind) and kind not in above:
        hints = get_type_hints(kind)
        return {f.name: _described(hints[f.name], (*above, kind)) for f in fields(kind)}
    parts = get_args(kind)
    return [getattr(kind, "__name__", str(kind)), *(_described(part, above) for part in parts)]


def main() -> int:
    try:
        build(RunConfig, json.load(sys.stdin))
    except (BadInput, ValueError) as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    print(wire_signature())
    return DONE


if __name__ == "__main__":
    sys.exit(main())
