"""What bench.py measures: each work beside its peers and its limit.

A work is a function from Setup to rows: it makes its sides from the same weights, and times them.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_torch.inference.config import SamplingConfig
from llama_torch.inference.cuda_graph import GraphStore
from llama_torch.inference.engine import DecodeBatch, generate, generate_tokens
from llama_torch.model.config import ModelConfig
from llama_torch.model.llama import Llama
from reference_np.config import LlamaConfig

from ..shapes import SHAPES
from . import numpy_oracle, training
from .llama_cpp_peer import llama_cpp_peer
from .timing import (
    Row,
    Setup,
    Side,
    Sides,
    Speeds,
    alternate,
    memory_sides,
    paired,
    rows,
    same_numbers,
    same_tokens,
)
from .training import TrainRow
from .transformers_peer import transformers_peer

BATCHES = {"124m": 32, "1.1b": 8, "7b": 1}  # windows in a training step; 4 of other shapes

PREFILL = 512  # tokens, in one forward pass

ROWS = 32  # of batch32

NUMPY_SHAPE, NUMPY_PREFILL, NUMPY_STEPS = "15m", 256, 64


@torch.no_grad()
def make_model(shape: ModelConfig, dtype: torch.dtype, device: torch.device) -> Llama:
    """Draw a model where it is to run, in the dtype it is to have.

    Every matrix keeps the variance of what it multiplies. As the trainer draws them, blocks add
    little at first, and with a tied head any model would repeat its last token, right or wrong.
    """
    with torch.device("meta"):
        model = Llama(shape).to(dtype)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for weight in model.parameters():
        if weight.ndim == 1:
            weight.fill_(1.0)
        else:
            weight.normal_(0.0, weight.shape[1] ** -0.5, generator=generator)
    return model


def model_for(setup: Setup, context: int) -> Llama:
    """Return the asked-for shape with a context of this length."""
    shape = SHAPES[setup.shape].to_hf() | {"max_position_embeddings": context}
    return make_model(ModelConfig.from_hf(shape), setup.torch_dtype, setup.device)


def prompts_for(model: Llama, n_rows: int, length: int) -> list[list[int]]:
    """Return different prompts of one length."""
    ids = itertools.count(1000)
    return [[next(ids) % model.config.vocab_size for _ in range(length)] for _ in range(n_rows)]


@contextmanager
def llama_cpp(
    model: Llama, setup: Setup, flash: bool, side: Callable[[Any], Side]
) -> Iterator[Sides]:
    """Yield llama.cpp's side where it is a peer: in float32 on the CPU."""
    if setup.device.type != "cpu" or setup.dtype != "float32":
        yield {}
        return
    with llama_cpp_peer(model, flash) as peer:
        yield {"llama.cpp": side(peer) if peer else None}


def train(setup: Setup) -> list[TrainRow]:
    """Measure optimizer steps of the asked-for shape."""
    batch_size = setup.batch_size or BATCHES.get(setup.shape, 4)
    return training.measure(setup, SHAPES[setup.shape], batch_size)


# Greedy decoding, from a prompt as long as the answer. Its limit is the memory's speed.


class Decoding:
    """Our decoding of some prompts, and how fast each call went on after the first tokens."""

    def __init__(self, model: Llama, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
        self.model, self.prompts, self.new_tokens = model, prompts, new_tokens
        self.settings = SamplingConfig(new_tokens, temperature=0)
        self.graphs = GraphStore(model)
        self.steps_per_second: list[float] = []
        # A step reads every matrix once; the embedding is looked up, unless it is the head too.
        read = [t.nbytes for t in model.state_dict().values() if t.ndim > 1]
        tied = model.config.tie_embeddings
        self.bytes = sum(read) - (0 if tied else model.model.embed_tokens.weight.nbytes)

    def __call__(self) -> list[int]:
        """Return the new tokens, those of one step together."""
        tokens, times = [], []
        for token in self._tokens():
            tokens.append(token)
            times.append(time.perf_counter())
        self.steps_per_second.append((self.new_tokens - 1) / (times[-1] - times[0]))
        return tokens

    def _tokens(self) -> Iterator[int]:
        if len(self.prompts) == 1:
            return generate(self.model, self.prompts[0], self.settings, graphs=self.graphs)
        settings = [self.settings] * len(self.prompts)
        batch = DecodeBatch(self.model, self.prompts, settings, graphs=self.graphs)
        return (token.id for token in generate_tokens(batch))

    def side(self) -> Side:
        """Return it as a side."""
        return Side(self, self.new_tokens * len(self.prompts))

    def limit(self, setup: Setup, speeds: Speeds) -> float:
        """Return the bytes read per second in the timed calls beside the memory's."""
        read = [self.bytes * steps for steps in self.steps_per_second[-setup.repeats :]]
        memory = [speeds[name] for name in speeds if name.startswith("(")]
        return paired(read, [max(each) for each in zip(*memory, strict=True)])


def decoding_rows(work: str, dtype: str, ours: Decoding, peers: Sides, setup: Setup) -> list[Row]:
    """Time ours, the peers and the memory."""
    sides = {"ours": ours.side()} | peers | memory_sides(setup.device)
    speeds = alternate(sides, setup, same_tokens)
    return rows(work, setup.shape, dtype, sides, speeds, ours.limit(setup, speeds))


def peer_generate(peer: Any, ours: Decoding, **settings: Any) -> Side | None:
    """Return transformers' greedy decoding; its tokens in the order of ours."""
    if peer is None:
        return None
    inputs = torch.tensor(ours.prompts, device=peer.device)

    @torch.inference_mode()
    def call() -> list[int]:
        out: Tensor = peer.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=ours.new_tokens,
            min_new_tokens=ours.new_tokens,
            do_sample=False,
            pad_token_id=0,
            **settings,
        )
        return [int(token) for token in out[:, inputs.shape[1] :].T.flatten().tolist()]

    return Side(call, ours.side().amount)


def decode(setup: Setup) -> list[Row]:
    """Measure one sequence."""
    n, model = setup.new_tokens, model_for(setup, 2 * setup.new_tokens)
    ours = Decoding(model, prompts_for(model, 1, n), n)
    peer = transformers_peer(model, setup.device)
    peers: Sides = {"transformers": peer_generate(peer, ours)}
    if setup.compiled_peer:
        compiled = peer_generate(peer, ours, cache_implementation="static")
        peers["transformers, static cache, compiled"] = compiled

    def side(cpp: Any) -> Side:
        return Side(lambda: cpp.generate(ours.prompts[0], n), n)

    with llama_cpp(model, setup, False, side) as cpp:
        return decoding_rows("decode", setup.dtype, ours, peers | cpp, setup)


def batch32(setup: Setup) -> list[Row]:
    """Measure many sequences together, beside one of them alone."""
    n, model = setup.new_tokens, model_for(setup, 2 * setup.new_tokens)
    prompts = prompts_for(model, ROWS, n)
    ours, alone = Decoding(model, prompts, n), Decoding(model, prompts[:1], n)
    theirs = peer_generate(transformers_peer(model, setup.device), ours)
    peers: Sides = {"ours, batch 1": alone.side(), "transformers": theirs}
    return decoding_rows("batch32 decode", setup.dtype, ours, peers, setup)


def int8(setup: Setup) -> list[Row]:
    """Measure one sequence with int8 weights, beside the same model as it was."""
    from llama_torch.inference.quantization import quantize

    n, plain = setup.new_tokens, model_for(setup, 2 * setup.new_tokens)
    quantised = model_for(setup, 2 * n)
    quantize(quantised)
    ours, peer = (Decoding(model, prompts_for(plain, 1, n), n) for model in (quantised, plain))
    return decoding_rows("decode", "int8", ours, {f"ours, {setup.dtype}": peer.side()}, setup)


# A prompt alone. Its limit is the speed of its matrix products.


def prefill(setup: Setup) -> list[Row]:
    """Measure one forward pass that leaves a cache and the last position's logits."""
    model = model_for(setup, PREFILL)
    [prompt] = prompts_for(model, 1, PREFILL)
    tokens = torch.tensor([prompt], device=setup.device)
    peer = transformers_peer(model, setup.device)

    @torch.inference_mode()
    def ours() -> Tensor:
        hidden, _ = model.model(tokens)
        return F.linear(hidden[0, -1], model.head_weight)

    @torch.inference_mode()
    def theirs() -> Tensor:
        logits: Tensor = peer(tokens, use_cache=True, logits_to_keep=1).logits
        return logits[0, -1]

    sides: Sides = {"ours": Side(ours, PREFILL), "transformers": peer and Side(theirs, PREFILL)}
    with llama_cpp(model, setup, True, lambda cpp: Side(lambda: cpp.prefill(prompt), PREFILL)) as c:
        sides |= c | {"(products)": Side(products(model, PREFILL), PREFILL)}
        speeds = alternate(sides, setup, same_numbers)
    limit = paired(speeds["ours"], speeds["(products)"])
    return rows("prefill", setup.shape, setup.dtype, sides, speeds, limit)


def products(model: Llama, length: int) -> Callable[[], None]:
    """Return a prompt's matrix products alone: every linear map, and attention."""
    config, head = model.config, model.head_weight
    heads, groups, width = config.n_heads, config.n_kv_heads, config.head_dim

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=head.dtype, device=head.device)

    q, k, v = (draw(1, length, n, width).transpose(1, 2) for n in (heads, groups, groups))
    layers = [
        [module.weight for module in layer.modules() if isinstance(module, nn.Linear)]
        for layer in model.model.layers
    ]
    inputs = {size: draw(1, length, size) for size in {w.shape[1] for w in layers[0]}}
    last = draw(config.dim)

    @torch.inference_mode()
    def call() -> None:
        for weights in layers:
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != groups)
            for weight in weights:
                F.linear(inputs[weight.shape[1]], weight)
        F.linear(last, head)

    return call


def oracle(
    work: str, tokens: int, make: Callable[[LlamaConfig], numpy_oracle.Trio], setup: Setup
) -> list[Row]:
    """Measure the oracle, a plain NumPy Llama and the oracle's products, on the CPU."""
    trio = make(LlamaConfig.from_hf(SHAPES[NUMPY_SHAPE].to_hf()))
    names = ("ours", "plain NumPy", "(products)")
    sides: Sides = {n: Side(call, tokens) for n, call in zip(names, trio, strict=True)}
    speeds = alternate(sides, setup)
    limit = paired(speeds["ours"], speeds["(products)"])
    return rows(work, NUMPY_SHAPE, "float32", sides, speeds, limit)


WORKS: dict[str, Callable[[Setup], Sequence[Row | TrainRow]]] = {
    "train": train,
    "decode": decode,
    "prefill": prefill,
    "batch32": batch32,
    "int8": int8,
    "numpy-prefill": partial(
        oracle,
        "numpy-prefill",
        NUMPY_PREFILL,
        lambda config: numpy_oracle.prefill(config, NUMPY_PREFILL, seed=0),
    ),
    "numpy-decode": partial(
        oracle,
        "numpy-decode",
        NUMPY_STEPS,
        lambda config: numpy_oracle.decode(config, NUMPY_PREFILL, NUMPY_STEPS, seed=0),
    ),
}
