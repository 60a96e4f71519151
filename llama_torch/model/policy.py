"""The policy of PPO with its value function: a Llama with a scalar head beside its own.

Both heads read one trunk (section 3.2.3 names PPO alone; Schulman et al. 2017, section 3, for
networks that share parameters). The value head is part of a run's checkpoints and of no model
directory, which is a language model's.

Suffixes: D dim.
"""

from torch import nn

from .config import ModelConfig
from .llama import Llama


class ValuedPolicy(Llama):
    """A language model, and the value of every position: the reward that is still to come."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.value = nn.Linear(config.dim, 1, bias=False)

    def parts(self) -> list[nn.Module]:
        """Return modules that together have every parameter, in the order of ``parameters()``."""
        return [*super().parts(), self.value]

    def new_parts(self) -> list[nn.Module]:
        """Return the parts that a language model's checkpoint does not hold."""
        return [self.value]
