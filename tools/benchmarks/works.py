"""Measure each work of bench.py beside its peers and its limit.

A work is a function of a Setup that builds its sides from the same weights, times them, and
returns rows of the table.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_torch.inference.config import SamplingConfig
from llama_torch.inference.cpu_choice import prompt_products
from llama_torch.inference.cuda_graph import GraphStore
from llama_torch.inference.eager_step import EagerStep
from llama_torch.inference.engine import DecodeBatch, generate, generate_tokens
from llama_torch.model.kv_cache import StaticCache
from llama_torch.model.llama import Llama
from reference_np.config import LlamaConfig

from ..shapes import SHAPES
from . import numpy_oracle, training
from .llama_cpp_peer import llama_cpp_peer
from .random_models import model_for, prompts_for
from .timing import (
    Setup,
    SpeedRow,
    Speeds,
    TimedCall,
    TimedCalls,
    median_ratio,
    memory_reads,
    same_numbers,
    same_tokens,
    speed_rows,
    time_alternately,
)
from .training import TrainRow
from .transformers_peer import transformers_peer

BATCHES = {"124m": 32, "1.1b": 8, "7b": 1}  # windows in a training step; 4 for other shapes

PREFILL = 512  # tokens, in one forward pass

NUMPY_SHAPE, NUMPY_PREFILL, NUMPY_STEPS = "15m", 256, 64


@contextmanager
def llama_cpp(
    model: Llama, setup: Setup, flash: bool, side: Callable[[Any], TimedCall]
) -> Iterator[TimedCalls]:
    """Yield llama.cpp's side; nothing where it is no peer, which it is in float32 on the CPU."""
    if setup.device.type != "cpu" or setup.dtype != "float32":
        yield {}
        return
    with llama_cpp_peer(model, flash) as peer:
        yield {"llama.cpp": side(peer) if peer else None}


def train(work: str, setup: Setup) -> list[TrainRow]:
    """Measure optimizer steps: on all tokens, or of fine-tuning ("sft", "reward")."""
    batch_size = setup.batch_size or BATCHES.get(setup.shape, 4)
    return training.measure(setup, SHAPES[setup.shape], batch_size, work)


# Greedy decoding after a prompt of as many tokens. Its limit is the memory's speed.


class Decoding:
    """Decodes prompts with our model, and keeps each call's steps per second after the first."""

    def __init__(self, model: Llama, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
        self.model, self.prompts, self.new_tokens = model, prompts, new_tokens
        self.settings = SamplingConfig(new_tokens, temperature=0)
        self.graphs = GraphStore(model)
        self.steps_per_second: list[float] = []
        # A step reads every matrix once, but for an embedding that is not the head too.
        sizes = [t.nbytes for t in model.state_dict().values() if t.ndim > 1]
        tied = model.config.tie_embeddings
        self.bytes_per_step = sum(sizes) - (0 if tied else model.model.embed_tokens.weight.nbytes)

    def __call__(self) -> list[int]:
        """Return the new token ids, step by step."""
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

    def side(self) -> TimedCall:
        """Return the call to time, in tokens."""
        return TimedCall(self, self.new_tokens * len(self.prompts))

    def limit(self, setup: Setup, speeds: Speeds) -> float:
        """Return our bytes read per second as a fraction of the memory's, over the timed calls."""
        read = [self.bytes_per_step * steps for steps in self.steps_per_second[-setup.repeats :]]
        memory = [speeds[name] for name in speeds if name.startswith("(")]
        return median_ratio(read, [max(each) for each in zip(*memory, strict=True)])


def decoding_rows(
    work: str, dtype: str, ours: Decoding, peers: TimedCalls, setup: Setup
) -> list[SpeedRow]:
    """Time ours, the peers and the memory; return a row for each peer."""
    sides = {"ours": ours.side()} | peers | memory_reads(setup.device)
    speeds = time_alternately(sides, setup, same_tokens)
    return speed_rows(work, setup.shape, dtype, sides, speeds, ours.limit(setup, speeds))


def peer_generate(peer: Any, ours: Decoding, **settings: Any) -> TimedCall | None:
    """Return transformers' greedy decoding, its token ids step by step as ours; None without it."""
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

    return TimedCall(call, ours.side().amount)


def decode(setup: Setup) -> list[SpeedRow]:
    """Measure decoding of one sequence."""
    n, model = setup.new_tokens, model_for(setup, 2 * setup.new_tokens)
    ours = Decoding(model, prompts_for(model, 1, n), n)
    peer = transformers_peer(model, setup.device)
    peers: TimedCalls = {"transformers": peer_generate(peer, ours)}
    if setup.compiled_peer:
        compiled = peer_generate(peer, ours, cache_implementation="static")
        peers["transformers, static cache, compiled"] = compiled

    def side(cpp: Any) -> TimedCall:
        return TimedCall(lambda: cpp.generate(ours.prompts[0], n), n)

    with llama_cpp(model, setup, False, side) as cpp:
        return decoding_rows("decode", setup.dtype, ours, peers | cpp, setup)


def batch(rows: int, setup: Setup) -> list[SpeedRow]:
    """Measure decoding of ``rows`` sequences together, beside one of them alone."""
    n, model = setup.new_tokens, model_for(setup, 2 * setup.new_tokens)
    prompts = prompts_for(model, rows, n)
    ours, alone = Decoding(model, prompts, n), Decoding(model, prompts[:1], n)
    theirs = peer_generate(transformers_peer(model, setup.device), ours)
    peers: TimedCalls = {"ours, batch 1": alone.side(), "transformers": theirs}
    return decoding_rows(f"batch{rows} decode", setup.dtype, ours, peers, setup)


def int8(setup: Setup) -> list[SpeedRow]:
    """Measure decoding of one sequence with int8 weights, beside the setup's dtype."""
    from llama_torch.inference.quantization import quantize

    n, original = setup.new_tokens, model_for(setup, 2 * setup.new_tokens)
    quantized = model_for(setup, 2 * n)
    quantize(quantized, "int8")
    prompts = prompts_for(original, 1, n)
    ours, peer = (Decoding(model, prompts, n) for model in (quantized, original))
    return decoding_rows("decode", "int8", ours, {f"ours, {setup.dtype}": peer.side()}, setup)


def bfloat16(setup: Setup) -> list[SpeedRow]:
    """Measure decoding of one sequence with the same weights in bfloat16, beside the setup's."""
    n, original = setup.new_tokens, model_for(setup, 2 * setup.new_tokens)
    narrow = model_for(setup, 2 * n).to(torch.bfloat16)
    prompts = prompts_for(original, 1, n)
    ours, wide = (Decoding(model, prompts, n) for model in (narrow, original))
    theirs = peer_generate(transformers_peer(narrow, setup.device), ours)
    peers: TimedCalls = {f"ours, {setup.dtype}": wide.side(), "transformers": theirs}

    def side(cpp: Any) -> TimedCall:
        return TimedCall(lambda: cpp.generate(prompts[0], n), n)

    with llama_cpp(narrow, setup, False, side) as cpp:
        rounded = setup._replace(dtype="bfloat16")  # whose sides round apart
        return decoding_rows("decode", "bfloat16", ours, peers | cpp, rounded)


# One forward pass of a prompt. Its limit is the speed of its matrix products.


def prefill(setup: Setup) -> list[SpeedRow]:
    """Measure one forward pass that returns a cache and the last position's logits [V]."""
    model = model_for(setup, PREFILL)
    [prompt] = prompts_for(model, 1, PREFILL)
    tokens = torch.tensor([prompt], device=setup.device)
    peer = transformers_peer(model, setup.device)

    cache = StaticCache(model.config, 1, PREFILL, setup.torch_dtype, setup.device)
    step = EagerStep(model, cache, prompt_products(model))

    @torch.inference_mode()
    def ours() -> Tensor:
        cache.length = 0
        return step.prefill(tokens, PREFILL)[0]

    @torch.inference_mode()
    def theirs() -> Tensor:
        logits: Tensor = peer(tokens, use_cache=True, logits_to_keep=1).logits
        return logits[0, -1]

    sides: TimedCalls = {
        "ours": TimedCall(ours, PREFILL),
        "transformers": peer and TimedCall(theirs, PREFILL),
    }
    with llama_cpp(
        model, setup, True, lambda cpp: TimedCall(lambda: cpp.prefill(prompt), PREFILL)
    ) as c:
        sides |= c | {"(products)": TimedCall(products(model, PREFILL), PREFILL)}
        speeds = time_alternately(sides, setup, same_numbers)
    limit = median_ratio(speeds["ours"], speeds["(products)"])
    return speed_rows("prefill", setup.shape, setup.dtype, sides, speeds, limit)


def products(model: Llama, length: int) -> Callable[[], None]:
    """Return a function that runs a prompt's matrix products: linear layers and attention."""
    config, head = model.config, model.head_weight
    heads, groups, width = config.n_heads, config.n_kv_heads, config.head_dim

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=head.dtype, device=head.device)

    q, k, v = (draw(1, length, n, width).transpose(1, 2) for n in (heads, groups, groups))
    layers = [
        [module for module in layer.modules() if isinstance(module, nn.Linear)]
        for layer in model.model.layers
    ]
    inputs = {size: draw(1, length, size) for size in {each.in_features for each in layers[0]}}
    multiply = prompt_products(model)
    last = draw(config.dim)

    @torch.inference_mode()
    def call() -> None:
        for linears in layers:
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != groups)
            for layer in linears:
                multiply(inputs[layer.in_features], [layer])
        F.linear(last, head)

    return call


def oracle(
    work: str, tokens: int, make: Callable[[LlamaConfig], numpy_oracle.Trio], setup: Setup
) -> list[SpeedRow]:
    """Measure the oracle, a plain NumPy Llama and the oracle's matrix products, on the CPU."""
    trio = make(LlamaConfig.from_hf(SHAPES[NUMPY_SHAPE].to_hf()))
    names = ("ours", "plain NumPy", "(products)")
    sides: TimedCalls = {n: TimedCall(call, tokens) for n, call in zip(names, trio, strict=True)}
    speeds = time_alternately(sides, setup)
    limit = median_ratio(speeds["ours"], speeds["(products)"])
    return speed_rows(work, NUMPY_SHAPE, "float32", sides, speeds, limit)


WORKS: dict[str, Callable[[Setup], Sequence[SpeedRow | TrainRow]]] = {
    "train": partial(train, "train"),
    "sft": partial(train, "sft"),
    "reward": partial(train, "reward"),
    "decode": decode,
    "prefill": prefill,
    "batch8": partial(batch, 8),
    "batch32": partial(batch, 32),
    "bfloat16": bfloat16,
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
