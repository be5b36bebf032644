"""The supervisor without its hands: inputs and a clock in, effects out. No I/O, no clock of its
own, no randomness.

Theory of operation
===================

`Supervisor` is a state machine that a host drives. The host owns the links, the files and the
clock, and owes it four things: every input goes in, in the order in which it came; `now` never goes
back; effects are carried out in the order given; and nothing behind an `Append` happens before its
entry is durable. The whole loop (shell/event_loop.py and shell/effect_runner.py are this, and
threads)::

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

Inputs are handled, one or a batch of them, in three moves. `ClusterView.apply_input` takes each in,
and says whether it is news: most are not, and end here. Then `decide` (rules/table.py), which is
pure, is asked again and again: each decision changes the state, because it is journalled, or the
view, because it is marked as sent, and so silences the rule that made it. When no rule has anything
left to say, the effects go back to the host. What every effect promises stands in effects.py, who
gives every input in inputs.py.

No answer is ever waited for. An effect that matters and may get lost is decided again later, by the
same rule, for as long as what it is for has not come about.

To host it in a test, be the host: keep a list for a journal, feed inputs, look at the effects, and
advance `now` by hand (opt_train/simulation/world.py). To kill the supervisor between any two
effects is to drop the object there and make another of the journal so far.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from opt_logbook.record.events import (
    Entry,
    Event,
    JournalStalled,
    LineageOpened,
    Note,
    SupervisorStarted,
)
from opt_logbook.record.stability_events import BatchSources

from opt_train.config.run_config import RunConfig
from opt_train.protocol.facts import OrderObeyed, RankFact
from opt_train.protocol.interventions import INTERVENE, orders_of
from opt_train.protocol.orders import SaveAndStop
from opt_train.run.fold import fold
from opt_train.run.hold import hold_event
from opt_train.run.rollback import with_rollback
from opt_train.run.state import NODES_END, NODES_LOST, RunState, Stage
from opt_train.supervisor.cluster_view import ClusterView
from opt_train.supervisor.effects import Append, Effect, RetireCheckpoint, StartAgent, WriteMetrics
from opt_train.supervisor.inputs import (
    BatchRead,
    FactReceived,
    Identity,
    InboxReceived,
    Input,
    JournalWasStalled,
    MetricsReceived,
    Now,
    StopAsked,
)
from opt_train.supervisor.rules.context import Context, Decision, Record
from opt_train.supervisor.rules.orders import final_effect, follow_back, order_given
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
        self.view = ClusterView(config, Now(0.0, 0.0))

    def begin(self, now: Now) -> list[Effect]:
        """Take the run over, or create it: the first lines of this supervisor, and an agent on
        every node."""
        self.view = ClusterView(self.config, now, self.identity.nodes)
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
            opened = LineageOpened(
                self.state.lineage + 1, identity.config_sha256, difference, identity.code_sha256
            )
            effects += self._append(Record(opened))
        started = SupervisorStarted(
            identity.leader,
            identity.host,
            identity.pid,
            identity.version,
            resumed,
            identity.supervisor_difference,
        )
        effects += self._append(Record(started))
        # Journalled as retired or abandoned, but the crash may have come before the folder was
        # gone.
        effects += [RetireCheckpoint(path) for path in (*self.state.retired, *self.state.abandoned)]
        effects += [StartAgent(node) for node in identity.nodes if not self.state.has_failed(node)]
        return [*effects, *self._settle()]

    def handle(self, input_: Input, now: Now) -> list[Effect]:
        """What is to be done about all that is known at `now`, `input_` included."""
        return self.handle_all((input_,), now)

    def handle_all(self, inputs: Sequence[Input], now: Now) -> list[Effect]:
        """What is to be done about all that is known at `now`, `inputs` included, in the order in
        which they came.

        For whoever has several at hand: thousands of agents that dial in at once cost one decision
        a batch, not one each.
        """
        effects: list[Effect] = []
        news = False
        for input_ in inputs:
            if self.view.finished:
                break
            # Before the view takes the line in: afterwards its step is the newest, and no news.
            effects += self._announce(input_)
            news |= self.view.apply_input(input_, now, self.state)
            # At once: the next input may be the first metrics line of the new attempt.
            effects += self._follow_back(input_)
            if isinstance(input_, BatchRead):
                read = BatchSources(input_.alarm, input_.documents, input_.sources)
                effects += self._append(Record(read, input_.step, input_.attempt))
            for event in self._journalled(input_):
                effects += self._append(Record(event))
        return [*effects, *self._settle()] if news else effects

    def _settle(self) -> list[Effect]:
        """Decide until there is nothing left to decide."""
        effects: list[Effect] = []
        for _ in range(MOST_ROUNDS):
            decisions = decide(self.state, self.view, self.config, self.identity)
            if not decisions:
                self.view.end_input()
                return effects
            effects += self._carry_out(decisions)
            if self.view.finished:
                return effects
        raise AssertionError(f"the policy does not come to rest: {effects[-3:]}")

    def _carry_out(self, decisions: Sequence[Decision]) -> list[Effect]:
        effects: list[Effect] = []
        for decision in decisions:
            if isinstance(decision, Record):
                effects += self._append(decision)
            else:
                self.view.mark_sent(decision)
                effects.append(decision)
        return effects

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

    def _follow_back(self, input_: Input) -> list[Effect]:
        """What follows at once from ranks that have gone back in place."""
        match input_:
            case FactReceived(fact=RankFact(fact=OrderObeyed(number))):
                situation = Context(self.state, self.view, self.config, self.identity)
                return self._carry_out(follow_back(situation, number))
            case _:
                return []

    def _journalled(self, input_: Input) -> list[Event]:
        """Inputs that are lines of the journal by themselves."""
        match input_:
            case JournalWasStalled(seconds):
                return [JournalStalled(seconds)]
            case InboxReceived(message) if message.get("kind") == "note":
                return [Note(str(message.get("author", "")), str(message.get("text", "")))]
            case InboxReceived(message) if message.get("kind") == "stop":
                return self._stop(str(message.get("by", "inbox")))
            case InboxReceived(message) if message.get("kind") == INTERVENE:
                return self._intervene(message)
            case InboxReceived(message) if self.state.stage is not Stage.FINISHED:
                changed = hold_event(message, self.state.hold)
                return [] if changed is None else [changed]
            case StopAsked(by):
                return self._stop(by)
            case _:
                return []

    @property
    def goes_on_after_stop(self) -> bool:
        """Whether the run stops as its nodes' time is over, and goes on with others."""
        stop = self.state.stop_wanted
        return stop is not None and stop.reason in (NODES_END, NODES_LOST)

    def _intervene(self, message: Mapping[str, Any]) -> list[Event]:
        if not self.state.takes_orders:
            return []
        first, batch = self.state.orders_given + 1, self.config.train.global_batch
        asked = orders_of(message, first, batch)
        given = with_rollback(self.state, asked, self.view.highest_generation)
        return [order_given(order) for order in given]

    def _stop(self, by: str) -> list[Event]:
        # A second request is no second order. How often it was asked the view counts: twice is
        # impatience, and ends the ranks without a save (rules/orders.py).
        if not self.state.takes_orders:
            return []
        return [order_given(SaveAndStop(self.state.orders_given + 1, by))]
