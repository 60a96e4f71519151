"""The reward model: a Llama with a scalar head in place of the language model's (section 3.2.2).

"The model architecture and hyper-parameters remain identical to those of the pretrained language
models, except that the classification head for next-token prediction is replaced with a regression
head for outputting a scalar reward."

Suffixes: B row, T position, D dim.
"""

from torch import Tensor, nn

from .config import ModelConfig
from .llama import Decoder, Llama


class RewardModel(Llama):
    """Scores every position of a conversation; that of the last token is the conversation's.

    ``state_dict()`` has the names of Hugging Face's LlamaForSequenceClassification. The model's
    ``head`` gives rewards [..., 1] in place of logits.
    """

    def __init__(self, config: ModelConfig) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.model = Decoder(config)
        self.score = nn.Linear(config.dim, 1, bias=False)

    @property
    def has_own_head(self) -> bool:
        """True: the embedding is no head of this model, whatever the config says."""
        return True

    @property
    def head_weight(self) -> Tensor:
        """The scalar head [1, D]."""
        return self.score.weight

    def head(self, x_BTD: Tensor) -> Tensor:
        """Return the rewards [..., 1] of the normed residual stream [..., D]."""
        rewards: Tensor = self.score(x_BTD)
        return rewards

    def parts(self) -> list[nn.Module]:
        """Return modules that together have every parameter, in the order of ``parameters()``."""
        return [self.model.embed_tokens, *self.model.layers, self.model.norm, self.score]

    def new_parts(self) -> list[nn.Module]:
        """Return the parts that a language model's checkpoint does not hold."""
        return [self.score]
