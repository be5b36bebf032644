"""What the rules of the policy look at: state, observation and configuration in one, and questions
about them."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf

from opt_logbook.record.events import Event

from opt_train.config.run_config import RunConfig
from opt_train.diagnosis.causes import Cause
from opt_train.protocol.commands import Kill
from opt_train.protocol.facts import SlotState
from opt_train.run.attempt import Attempt
from opt_train.run.state import VACANT, RunState
from opt_train.supervisor.cluster_view import ClusterView
from opt_train.supervisor.effects import Effect, FenceNode, Send
from opt_train.supervisor.generation_view import GenerationView
from opt_train.supervisor.inputs import Identity
from opt_train.supervisor.node_view import NodeView
from opt_train.supervisor.rules.node_fitness import is_unfit

REPEAT_SECONDS = 2.0
"""A kill that was not answered is sent again after this."""
UNKILLED_SECONDS = 60.0
"""An agent that cannot report the end of its ranks by then (one hangs in the kernel, say) is fenced
with its node."""
FENCE_AGAIN_SECONDS = 10.0
UNREACHABLE_SECONDS = 5.0
"""Grace for an agent to dial in again before its node is fenced: an agent that lives redials at
once."""
# Two clocks, from two moments: the agent counts from the last renewal that it received, we from the
# end of the link. The margin sees to it that the clock of the agent ends first.
LEASE_MARGIN = 1.25
"""An agent without a leader has killed its ranks after this many times
`supervisor.orphan_seconds`."""


@dataclass(frozen=True, slots=True)
class Record:
    """Journal `event`. `attempt` None: the current one."""

    event: Event
    step: int | None = None
    attempt: str | None = None


Decision = Record | Effect


@dataclass(frozen=True, slots=True)
class Context:
    """Read by the rules, changed by none of them."""

    state: RunState
    view: ClusterView
    config: RunConfig
    identity: Identity

    @property
    def attempt(self) -> Attempt:
        """The live attempt; rules of stages that have one may rely on it."""
        live = self.state.live
        assert live is not None, f"no attempt lives in stage {self.state.stage}"
        return live

    @property
    def generation(self) -> GenerationView:
        """What the ranks of the live attempt, and of its saves, have reported."""
        return self.view.generation(self.attempt.generation)

    @property
    def step(self) -> int:
        """Steps known to be done."""
        attempt = self.state.attempt
        if attempt is None:
            return 0
        if self.view.training.history.step >= 0:
            return self.view.training.history.step
        # A supervisor that has just come has received no metrics yet; where the ranks are is
        # the next best.
        running = [slot.step for _, slot in self.running(attempt.generation)]
        return max([attempt.start_step, *running])

    def running(self, generation: int) -> Iterator[tuple[str, SlotState]]:
        """Node and slot of each rank of `generation` that was last seen running."""
        for node, view in self.view.nodes.items():
            for slot in view.slots.values():
                if slot.stage == "running" and slot.generation == generation:
                    yield node, slot

    # Places ---------------------------------------------------------------------------------------

    def places(self) -> tuple[str, ...]:
        """The nodes that train, or should: those named first in the allocation, or what took their
        places."""
        if not self.state.replacements and not self.state.vacated:
            return self.identity.nodes[: self.config.cluster.nodes]
        return tuple(now for _, now in self._occupied() if now != VACANT)

    def vacant_places(self) -> list[str]:
        """The last node of each place that nothing has taken since, in the order of places."""
        if not self.state.vacated and not self.state.replacements:
            return []
        return [last for last, now in self._occupied() if now == VACANT]

    def _occupied(self) -> Iterator[tuple[str, str]]:
        """Of each place the last node that was in it, and who is: the same, or `VACANT`."""
        first = self.identity.nodes[: self.config.cluster.nodes]
        replaced, vacated = self.state.replacements, self.state.vacated
        taken = {node for node in first if node not in replaced and node not in vacated}
        for place in first:
            last = replaced.get(place, place)
            if last != place and last in taken:
                # What took its place in an earlier allocation is another one of those first now.
                yield place, VACANT
            elif place in vacated:
                yield last, VACANT
            else:
                taken.add(last)
                yield last, last

    @property
    def nodes(self) -> tuple[str, ...]:
        """Every node of the run: those that this supervisor began with, then what has come."""
        return self.view.allocation

    def out_places(self) -> list[str]:
        """The places whose nodes can train no more, in the order of places."""
        failed = self.state.failed_nodes
        # Sets, as this is asked at each input of thousands of nodes.
        if failed.isdisjoint(places := self.places()) and self.view.members.issuperset(places):
            return []
        return [place for place in places if not self.is_usable(place)]

    def is_usable(self, node: str) -> bool:
        return node in self.view.members and not self.state.has_failed(node)

    def cause_of_loss(self, node: str, cause: str = Cause.NODE_FAILURE) -> str:
        """What `node` is taken out for, of which `cause` is known: a node that the scheduler took
        back has not failed."""
        taken_back = cause == Cause.NODE_FAILURE and self.view.node(node).taken_back
        return Cause.PREEMPTION if taken_back else cause

    def buffer_nodes(self, place: str = "") -> list[str]:
        """Buffer nodes that could take a place: those that are connected first, repeat offenders
        last, and then those nearest in the network to the node whose `place` it is."""
        places = set(self.places())
        free = [
            n
            for n in self.nodes
            if n not in places and not is_unfit(self.state, n) and not self.view.is_down(n)
        ]
        return sorted(free, key=lambda n: self.preference(n, place))

    def preference(self, node: str, place: str) -> tuple[bool, bool, int]:
        """The less, the sooner `node` takes the place of the node `place`."""
        far = self.identity.topology.distance(node, place)
        return not self.view.node(node).connected, node in self.state.lemons, far

    def is_warm(self, node: str) -> bool:
        """Every slot of the node has a warm rank, and nothing runs there."""
        # Without a warm rank in every slot one import of torch (7 to 10 s on a busy core) would
        # hold up all other ranks; from a warm one the first step takes 0.2 to 0.9 s (measured).
        slots = self.view.node(node).slots
        return all(
            k in slots
            and slots[k].stage != "running"
            and (slots[k].spare or slots[k].stage == "warm")
            for k in range(self.config.cluster.slots_per_node)
        )

    def ready_buffers(self) -> list[str]:
        """Buffer nodes that could train at once."""
        return [n for n in self.buffer_nodes() if self.view.node(n).connected and self.is_warm(n)]

    # Generations ----------------------------------------------------------------------------------

    def lease_is_over(self, view: NodeView) -> bool:
        """The node has been out of reach for so long that its agent has killed its ranks by
        itself."""
        silent = not view.connected and self.view.age(view.silent_since)
        return silent > LEASE_MARGIN * self.config.supervisor.orphan_seconds + UNREACHABLE_SECONDS

    def is_gone(self, node: str, generation: int) -> bool:
        """No rank of `generation` lives on `node`."""
        view = self.view.node(node)
        if view.gone_generation >= generation or self.view.is_down(node):
            return True
        return self.lease_is_over(view)

    def end_of(self, generation: int, nodes: tuple[str, ...]) -> list[Decision]:
        """What brings `generation` to its end: kills where agents can be reached, fences where that
        does not help."""
        decisions: list[Decision] = []
        for node in nodes:
            view = self.view.node(node)
            # A process in state D (a dead file system, a sick driver) does not die of SIGKILL: then
            # the node has to go.
            kill_sent_at = self.view.generation(generation).kill_sent_at.get(node, inf)
            if view.connected and self.view.age(kill_sent_at) > UNKILLED_SECONDS:
                fenced = self.view.was_sent(FenceNode(node), within=FENCE_AGAIN_SECONDS)
                if view.gone_generation < generation and not fenced:
                    decisions.append(FenceNode(node))
            elif view.connected:
                # Stacks, because the dead cannot be asked: they show which rank the others waited
                # for.
                kill = Kill(generation=generation, stacks=True)
                due = not self.view.was_sent(Send(node, kill), within=REPEAT_SECONDS)
                if view.gone_generation < generation and due:
                    decisions.append(Send(node, kill))
            elif view.gone_generation < generation and self.needs_fence(node):
                decisions.append(FenceNode(node))
        return decisions

    def needs_fence(self, node: str) -> bool:
        """Out of reach for longer than it takes to redial, or down: make sure that nothing lives
        there."""
        view = self.view.node(node)
        if self.view.was_sent(FenceNode(node), within=FENCE_AGAIN_SECONDS):
            return False
        return self.view.is_down(node) or self.view.age(view.silent_since) >= UNREACHABLE_SECONDS
