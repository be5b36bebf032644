"""The supervisor without its hands: inputs and a clock in, effects out. No I/O, no clock of its
own, no randomness.

Theory of operation
===================

`Supervisor` is a state machine that a host drives. The host owns the links, the files and the
clock, and owes it four things: every input goes in, one at a time; `now` never goes back; effects
are carried out in the order given; and nothing behind an `Append` happens before its entry is
durable. The whole loop (shell/event_loop.py and shell/effect_runner.py are this, and threads)::

    core = Supervisor(config, state, identity)     # state: the journal, folded
    effects = core.begin(now())
    while True:
        for effect in effects:
            match effect:
                case Append(entry):
                    journal.append(entry)          # returns when it is on the disk
                case Finish(code):
                    return code
                case _:
                    start(effect)                  # may fail, may be lost; its answer is an input
        effects = core.handle(inbox.get(), now())

What is decided is folded into the core's own state at once, and the entry goes out as an `Append`
in front of whatever follows from it. So the world never sees a decision that the journal could
forget, and a supervisor that folds the journal stands where the world last saw this one.

One input is handled in three moves. `ClusterView.apply_input` takes it in. Then `decide`
(rules/table.py), which is pure, is asked again and again: each decision changes the state, because
it is journalled, or the view, because it is marked as sent, and so silences the rule that made it.
When no rule has anything left to say, the effects go back to the host. What every effect promises
stands in effects.py, who gives every input in inputs.py.

No answer is ever waited for. An effect that matters and may get lost is decided again later, by the
same rule, for as long as what it is for has not come about.

To host it in a test, be the host: keep a list for a journal, feed inputs, look at the effects, and
advance `now` by hand (tests/supervisor/world.py). To kill the supervisor between any two effects is
to drop the object there and make another of the journal so far.
"""

from opt_logbook.record.events import (
    Entry,
    Event,
    JournalStalled,
    LineageOpened,
    Note,
    SupervisorStarted,
)

from opt_train.config.run_config import RunConfig
from opt_train.protocol.orders import SaveAndStop
from opt_train.run.fold import fold
from opt_train.run.state import TERMINAL, RunState, Stage
from opt_train.supervisor.cluster_view import ClusterView
from opt_train.supervisor.effects import Append, Effect, RetireCheckpoint, StartAgent, WriteMetrics
from opt_train.supervisor.inputs import (
    Identity,
    InboxReceived,
    Input,
    JournalWasStalled,
    MetricsReceived,
    Now,
    StopAsked,
)
from opt_train.supervisor.rules.context import Context, Record
from opt_train.supervisor.rules.orders import final_effect, order_given
from opt_train.supervisor.rules.table import decide

MOST_ROUNDS = 10_000
"""A rule that is not silent after it was obeyed is a mistake in the policy, never something the
world does."""


class Supervisor:
    """The state and the view of the cluster; `begin` once, then `handle` for every input."""

    def __init__(self, config: RunConfig, state: RunState, identity: Identity) -> None:
        self.config = config
        self.state = state
        self.identity = identity
        self.view = ClusterView(config.supervisor, Now(0.0, 0.0))

    def begin(self, now: Now) -> list[Effect]:
        """Take the run over, or create it: the first lines of this supervisor, and an agent on
        every node."""
        self.view = ClusterView(self.config.supervisor, now)
        identity = self.identity
        # Nothing is journalled: a finished run that is started again keeps its chronicle, byte for
        # byte (invariant 12).
        if self.state.stage is Stage.FINISHED and not identity.opens_lineage:
            self.view.finished = True
            return [final_effect(Context(self.state, self.view, self.config, identity))]
        resumed = self.state.created is not None
        effects = [] if resumed else self._append(Record(identity.created))
        if self.state.lineage == 0 or identity.opens_lineage:
            difference = identity.lineage_difference if self.state.lineage else ()
            opened = LineageOpened(self.state.lineage + 1, identity.config_sha256, difference)
            effects += self._append(Record(opened))
        started = SupervisorStarted(
            identity.leader, identity.host, identity.pid, identity.version, resumed
        )
        effects += self._append(Record(started))
        # Journalled as retired or abandoned, but the crash may have come before the folder was
        # gone.
        effects += [RetireCheckpoint(path) for path in (*self.state.retired, *self.state.abandoned)]
        effects += [StartAgent(node) for node in identity.nodes if not self.state.has_failed(node)]
        return [*effects, *self._settle()]

    def handle(self, input_: Input, now: Now) -> list[Effect]:
        """What is to be done about all that is known at `now`, `input_` included."""
        if self.view.finished:
            return []
        # Before the view takes the line in: afterwards its step is the newest, and no news.
        effects = self._announce(input_)
        self.view.apply_input(input_, now, self.state)
        for event in self._journalled(input_):
            effects += self._append(Record(event))
        return [*effects, *self._settle()]

    def _settle(self) -> list[Effect]:
        """Decide until there is nothing left to decide."""
        effects: list[Effect] = []
        for _ in range(MOST_ROUNDS):
            decisions = decide(self.state, self.view, self.config, self.identity)
            if not decisions:
                self.view.end_input()
                return effects
            for decision in decisions:
                if isinstance(decision, Record):
                    effects += self._append(decision)
                else:
                    self.view.mark_sent(decision)
                    effects.append(decision)
            if self.view.finished:
                return effects
        raise AssertionError(f"the policy does not come to rest: {effects[-3:]}")

    def _append(self, record: Record) -> list[Effect]:
        current = self.state.attempt.name if self.state.attempt is not None else ""
        attempt = current if record.attempt is None else record.attempt
        entry = Entry(
            time=round(self.view.now.wall, 3), attempt=attempt, step=record.step, event=record.event
        )
        # Folded before it is durable. If the process dies first, nobody has seen it: whatever
        # follows from it waits behind the `Append`.
        before, self.state = self.state, fold(self.state, entry)
        self.view.follow(before, self.state)
        return [Append(entry)]

    def _announce(self, input_: Input) -> list[Effect]:
        """A metrics line that is news goes to its attempt's file; older generations are fenced
        off."""
        if not isinstance(input_, MetricsReceived) or not self.view.training.is_new_line(
            input_, self.state
        ):
            return []
        assert self.state.attempt is not None
        return [WriteMetrics(self.state.attempt.name, input_.line)]

    def _journalled(self, input_: Input) -> list[Event]:
        """Inputs that are lines of the journal by themselves."""
        match input_:
            case JournalWasStalled(seconds):
                return [JournalStalled(seconds)]
            case InboxReceived(message) if message.get("kind") == "note":
                return [Note(str(message.get("author", "")), str(message.get("text", "")))]
            case InboxReceived(message) if message.get("kind") == "stop":
                return self._stop(str(message.get("by", "inbox")))
            case StopAsked(by):
                return self._stop(by)
            case _:
                return []

    def _stop(self, by: str) -> list[Event]:
        # A second request is no second order. How often it was asked the view counts: twice is
        # impatience, and ends the ranks without a save (rules/orders.py).
        if self.state.stop_wanted is not None or self.state.stage in (*TERMINAL, Stage.FINISHING):
            return []
        return [order_given(SaveAndStop(self.state.orders_given + 1, by))]
