"""Takes in the step stats at a boundary: what the world has come to, counted and published."""

from collections.abc import Mapping

from opt_train.optim.in_force import in_force
from opt_train.protocol.facts import Metrics
from opt_train.train.context import RankContext
from opt_train.train.stats.metrics import MetricsSource, metrics_line
from opt_train.train.stats.reducer import StatsReducer
from opt_train.train.stats.step_stats import StepStats


class StatsReceiver:
    """Everything that the loop decides by, the same on every rank: it comes from the step stats
    alone."""

    def __init__(self, context: RankContext, reducer: StatsReducer) -> None:
        self._context = context
        self._reducer = reducer
        self._has_published = False
        self.newest: StepStats | None = None
        self.stop_votes = 0
        """Of all steps received: who voted once has voted."""
        self.order_number = context.begin.order_number
        """The newest that any stats have carried."""

    def begin_attempt(self) -> None:
        """What comes from here on is of another attempt; all before has been received. Votes and
        order numbers are the processes' and stay."""
        self.newest, self._has_published = None, False

    def receive(self, before: int) -> None:
        """Take in the stats of the steps below `before`: counters, metrics, votes, the newest
        order's number. Waits for them."""
        context = self._context
        context.enter("waiting")
        # One or two steps: the loop leaves the newest under way, a save or validation takes all.
        for stats in self._reducer.collect(before):
            self.newest = stats
            values = in_force(context.config, context.state.ledger, stats.step)
            context.state.absorb(stats, values.get("loss_scale_floor", 1.0))
            self.stop_votes += stats.stop_votes
            # Four ranks that each read a pipe of their own obeyed 19 of 20 orders at different
            # steps; with the number in the stats, read a step late, none of 20.
            self.order_number = max(self.order_number, stats.order_number)
            if context.is_rank_zero:
                self._publish_metrics(stats, values)

    def _publish_metrics(self, stats: StepStats, values: Mapping[str, float]) -> None:
        context, config = self._context, self._context.config
        source = MetricsSource(
            config=config,
            begin=context.begin,
            state=context.state,
            stats=stats,
            learning_rate=values["lr"],
            samples=int(values["samples"]) + config.train.global_batch,
            device=context.device,
            loss_scale_floor=values.get("loss_scale_floor"),
        )
        context.publish(Metrics(metrics_line(source, is_first=not self._has_published)))
        self._has_published = True
