"""Where in the model gradients and weights are large: one squared L2 norm a layer, without waiting
for the device."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

_OF_LAYER = re.compile(r"\bdecoder\.layers\.(\d+)\.")
_OF_EMBEDDING = re.compile(r"\bdecoder\.(embed_tokens|embed_positions|project_in)\.")


def place_of(name: str, layers: int) -> int:
    """Where the parameter `name` counts: 0 the embedding, 1 to `layers` the layers, `layers + 1`
    what is behind them.

    A projection of an embedding of another width counts with what it stands beside. The tied head
    is the token embedding, so its gradient counts there.
    """
    if found := _OF_LAYER.search(name):
        return int(found[1]) + 1
    return 0 if _OF_EMBEDDING.search(name) else layers + 1


class LayerSquares:
    """Adds up squares of parts of parameters by their layers."""

    def __init__(
        self, names: Sequence[str], copies: Sequence[int], layers: int, device: torch.device
    ) -> None:
        """Get ready for parts of parameters of these `names`.

        Args:
            copies: how many ranks hold each part (`opt_train.optim.clip.copies_of`).
            layers: of the model.
        """
        places = [place_of(name, layers) for name in names]
        self.embedding = tuple(number for number, place in enumerate(places) if place == 0)
        """Which of the parts are the embedding's."""
        self._places = torch.tensor(places, device=device)
        self._copies = torch.tensor(copies, dtype=torch.float64, device=device)
        self._layers = layers

    @torch.no_grad()
    def of(self, parts: Sequence[Tensor]) -> Tensor:
        """This rank's share of each layer's squared L2 norm, which the world's sum completes: fp64,
        [layers + 2].

        Args:
            parts: this rank's, in the order of the names; any may be empty.
        """
        # In fp32 and then fp64, as `opt_train.optim.clip.global_norm` has it, so that both agree.
        norms = torch.stack(torch._foreach_norm(list(parts), 2, dtype=torch.float32)).double()
        sums = torch.zeros(self._layers + 2, dtype=torch.float64, device=norms.device)
        return sums.index_add_(0, self._places, norms.square() / self._copies)
