"""When each effect was last asked of the shell, so that it is not asked again at once.

An effect that may be lost (a command on a link that breaks, a fence that hangs) is decided again
and again by its rule, for as long as what it is for has not come about. Between two of them lie the
seconds that the rule gives here. What makes two effects the same is their key: a command declares
it beside its fields (protocol/commands.py).
"""

from opt_train.protocol.commands import Fetch
from opt_train.supervisor.effects import FenceNode, InspectCheckpoint, Send

Repeatable = Send | FenceNode | InspectCheckpoint


class SentEffects:
    """Times are monotonic seconds. `connections` counts those of the command's node so far: a new
    connection makes every command news."""

    def __init__(self) -> None:
        self._sent: dict[tuple[str, ...], float] = {}

    def mark(self, effect: Repeatable, connections: int, now: float) -> None:
        """`effect` is asked of the shell now."""
        self._sent[_key_of(effect, connections)] = now

    def sent_at(self, effect: Repeatable, connections: int) -> float:
        """When `effect` was last asked of the shell; minus infinity: not yet."""
        return self._sent.get(_key_of(effect, connections), float("-inf"))

    def forget_fetches(self, path: str | None = None) -> None:
        """Every command to fetch files of the checkpoint `path`, or of any, is news again."""
        self._sent = {
            key: at
            for key, at in self._sent.items()
            if key[0] != Fetch.kind or path not in (None, key[_PATH])
        }

    def forget(self) -> None:
        """Everything is news again."""
        self._sent = {}


_PATH = 3
"""Where the key of a `Fetch` has the checkpoint, behind kind, node and connection."""


def _key_of(effect: Repeatable, connections: int) -> tuple[str, ...]:
    match effect:
        case Send(node, command):
            return (command.kind, node, str(connections), *command.key)
        case FenceNode(node):
            return ("fence", node)
        case InspectCheckpoint(path):
            return ("verify", path)
