"""The effects that the core has asked for and that are not carried out yet, as the shell keeps
them: in order, behind a journal that may stand still."""

from typing import TYPE_CHECKING

from opt_logbook.record.events import Entry, JournalStalled

from opt_train.supervisor.effects import AcknowledgeFact, Append, Effect, Send, Show
from opt_train.supervisor.inputs import JournalWasStalled

if TYPE_CHECKING:
    from opt_train.simulation.world import World

STALL_SECONDS = 1.0
"""An append that takes longer is a fact of its own."""


class EffectQueue:
    """Of one supervisor: what is in it dies with that one."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self._waiting: list[Effect] = []
        self._stalled_since: float | None = None

    @property
    def is_empty(self) -> bool:
        return not self._waiting

    def queue(self, effects: list[Effect]) -> None:
        """Carry `effects` out as soon as can be. What a person sees does not wait."""
        self._world.effects += [effect for effect in effects if isinstance(effect, Show)]
        self._waiting += [effect for effect in effects if not isinstance(effect, Show)]
        self.work()

    def forget_sends(self, node: str) -> None:
        """What waits for the journal and was to be sent by an older connection is lost with it."""
        self._waiting = [
            effect
            for effect in self._waiting
            if not isinstance(effect, Send | AcknowledgeFact) or effect.node != node
        ]

    def clear(self) -> None:
        """The supervisor is gone."""
        self._waiting, self._stalled_since = [], None

    def work(self) -> None:
        """Carry out what can be, in order: behind an append that is not durable nothing is."""
        world = self._world
        while self._waiting:
            effect = self._waiting[0]
            if isinstance(effect, Append) and not world.storage.takes_writes(world.now):
                if self._stalled_since is None:
                    self._stalled_since = world.now
                return
            if world.lives is not None:
                if world.lives == 0:
                    world.kill_supervisor()
                    return
                world.lives -= 1
            self._waiting.pop(0)
            world.effects.append(effect)
            world.perform(effect)
            if isinstance(effect, Append):
                self._report_stall(effect.entry)

    def _report_stall(self, entry: Entry) -> None:
        since, self._stalled_since = self._stalled_since, None
        # As in the shell, a stall that delayed the line about a stall is not reported in turn.
        if since is None or isinstance(entry.event, JournalStalled):
            return
        if self._world.now - since > STALL_SECONDS:
            self._world.queue.append(JournalWasStalled(self._world.now - since))
