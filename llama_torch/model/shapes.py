"""Every parameter's name and shape by arithmetic, without building a model or a list of names."""

import math
import re
from collections.abc import Iterator, Mapping

from .config import ModelConfig

Shape = tuple[int, ...]

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
SCORE = "score.weight"  # the head of a reward model
VALUE = "value.weight"  # the value head beside a policy's own; of checkpoints, not of models

_IN_LAYER = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,9})\.(.+)", re.ASCII)


def block_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Return the shapes of one block's parameters [out, in], by their names in the block."""
    dim, hidden = config.dim, config.hidden_dim
    queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    shapes = {
        "input_layernorm": (dim,),
        "self_attn.q_proj": (queries, dim),
        "self_attn.k_proj": (keys, dim),
        "self_attn.v_proj": (keys, dim),
        "self_attn.o_proj": (dim, queries),
        "post_attention_layernorm": (dim,),
        "mlp.gate_proj": (hidden, dim),
        "mlp.up_proj": (hidden, dim),
        "mlp.down_proj": (dim, hidden),
    }
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def outer_shapes(config: ModelConfig, is_reward: bool = False) -> dict[str, Shape]:
    """Return the shapes of the embedding, the final norm and, unless it is tied, the head.

    A reward model's head is the scalar one, and never tied.
    """
    matrix = config.vocab_size, config.dim
    head = {} if config.tie_embeddings else {HEAD: matrix}
    if is_reward:
        head = {SCORE: (1, config.dim)}
    return {EMBEDDING: matrix, NORM: (config.dim,), **head}


class ParameterShapes(Mapping[str, Shape]):
    """Shapes of a model's parameters by Hugging Face name, each computed when it is asked for.

    A config.json may claim 2^31 layers: what a checkpoint holds is compared with this mapping in
    the time that its own tensors take, however many are expected.
    """

    def __init__(self, config: ModelConfig, is_reward: bool = False) -> None:
        self.n_layers = config.n_layers
        self.block, self.outer = block_shapes(config), outer_shapes(config, is_reward)

    def __getitem__(self, name: str) -> Shape:
        if name in self.outer:
            return self.outer[name]
        found = _IN_LAYER.fullmatch(name)
        if not found or int(found[1]) >= self.n_layers:
            raise KeyError(name)
        return self.block[found[2]]

    def __iter__(self) -> Iterator[str]:
        first, *last = self.outer
        yield first
        for layer in range(self.n_layers):
            for name in self.block:
                yield f"model.layers.{layer}.{name}"
        yield from last

    def __len__(self) -> int:
        return len(self.outer) + self.n_layers * len(self.block)


def parameter_count(config: ModelConfig) -> int:
    """Return the number of parameters, a tied one once."""
    block = sum(map(math.prod, block_shapes(config).values()))
    return sum(map(math.prod, outer_shapes(config).values())) + config.n_layers * block
