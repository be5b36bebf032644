"""What the rules of the policy look at: state, observation and configuration in one, and questions
about them."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf

from opt_logbook.record.events import Event

from opt_train.config.run_config import RunConfig
from opt_train.protocol.commands import Kill
from opt_train.protocol.facts import SlotState
from opt_train.run.attempt import Attempt
from opt_train.run.state import RunState
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
        chosen = []
        for node in self.identity.nodes[: self.config.cluster.nodes]:
            place = node
            while place in self.state.replacements:
                place = self.state.replacements[place]
            chosen.append(place)
        return tuple(chosen)

    def is_usable(self, node: str) -> bool:
        return node in self.identity.nodes and not self.state.has_failed(node)

    def buffer_nodes(self) -> list[str]:
        """Buffer nodes that could take a place, those that are connected first."""
        places = set(self.places())
        free = [
            n
            for n in self.identity.nodes
            if n not in places and not is_unfit(self.state, n) and not self.view.is_down(n)
        ]
        return sorted(free, key=lambda n: not self.view.node(n).connected)

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
