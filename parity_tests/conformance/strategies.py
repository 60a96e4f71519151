"""Hypothesis strategies for weights, tokens, positions, masks and whole calls.

Weights and tokens come from NumPy's generator with a drawn seed: Hypothesis shrinks the shapes,
where porting bugs are, and leaves the weights dense.

Axes: B batch, T query position (this call's tokens), S key position (cache and this call).
"""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from reference_np.config import LlamaConfig
from reference_np.limits import UNLIMITED, Limits
from reference_np.model import Cache
from reference_np.naming import parameter_shapes

from .architectures import common_fields, configs, seeds
from .drawn import Draw, composite, describe_case

Array = NDArray[Any]
Params = dict[str, Array]

FREE_MASKS = ("any", "no later keys")  # of Limits.masks, those that are more than padding


def random_params(config: LlamaConfig, seed: int, embed_scale: float = 1.0) -> Params:
    """Return random float64 parameters by name that keep activations near one at every width.

    Norm weights are spread around one, so that a missing or misplaced one changes the result.
    """
    rng = np.random.default_rng(seed)
    params = {}
    for name, shape in parameter_shapes(config).items():
        values = rng.standard_normal(shape)
        if len(shape) == 1:
            params[name] = 1.0 + 0.3 * values
        elif name == "model.embed_tokens.weight":
            params[name] = embed_scale * values
        else:
            params[name] = values / np.sqrt(shape[1])
    return params


class Case(NamedTuple):
    """A model and the arguments of one call without a cache (S = T)."""

    config: LlamaConfig
    params: Params  # float64
    tokens: Array  # int64 [B, T]
    positions: Array | None  # int64 [B, T]
    mask: Array | None  # bool [B, T, S], True = may attend
    numbers: Mapping[str, Any] | None = None  # the labelled draws it was made from

    def __repr__(self) -> str:
        """Return the labelled draws in place of the arrays."""
        return describe_case(self)


@composite
def params_for(draw: Draw, config: LlamaConfig) -> Params:
    """Draw the float64 parameters of ``config``, by name.

    Small embeddings make the norm's epsilon matter. Extreme parameters have norm weights of either
    sign and a hundredfold size, and every other token's embedding so near zero that epsilon
    dominates its mean square.
    """
    scale = draw(st.sampled_from([1.0, 1e-3, 30.0]), label="embed scale")
    params = random_params(config, draw(seeds, label="weights seed"), scale)
    if draw(st.booleans(), label="extreme"):
        params["model.embed_tokens.weight"][::2] *= 1e-4
        for name, value in params.items():
            if name.endswith("layernorm.weight"):
                value[::3] *= -100.0
                params[name] = value / 30.0
    return params


@composite
def tokens_for(
    draw: Draw,
    config: LlamaConfig,
    max_batch: int = 3,
    min_length: int = 1,
    limits: Limits = UNLIMITED,
) -> Array:
    """Draw token ids [B, T]."""
    batch = draw(st.integers(1, min(max_batch, limits.batch or max_batch)), label="batch")
    length = draw(st.integers(min_length, 12), label="length")
    rng = np.random.default_rng(draw(seeds, label="tokens seed"))
    return rng.integers(0, config.vocab_size, (batch, length))


@composite
def masks(draw: Draw, batch: int, n_queries: int, n_keys: int) -> Array:
    """Draw a boolean mask [B, T, S], queries that may attend to no key included."""
    rng = np.random.default_rng(draw(seeds, label="mask seed"))
    density = draw(st.sampled_from([0.1, 0.5, 0.9]), label="mask density")
    return rng.random((batch, n_queries, n_keys)) < density


@composite
def positions_for(draw: Draw, batch: int, length: int, limits: Limits = UNLIMITED) -> Array:
    """Draw positions [B, T]: repeated, out of order, far past every usual context length.

    Under a limit they are consecutive from a far start, and within the context.
    """
    ends = sorted({min(end, limits.context or end) for end in (20, 4096, 70_000)})
    highest = draw(st.sampled_from(ends), label="highest position")
    if limits.positions == "shifted":
        shifted = np.arange(highest - length, highest)
        return np.tile(shifted, (batch, 1))
    rng = np.random.default_rng(draw(seeds, label="positions seed"))
    positions = rng.integers(0, highest, (batch, length))
    positions[-1, -1] = highest - 1
    return positions


def optional_positions(batch: int, length: int, limits: Limits) -> st.SearchStrategy[Array | None]:
    """Return the strategy of positions [B, T] within limits, or None for the default ones."""
    if limits.positions == "consecutive":
        return st.none()
    return st.none() | positions_for(batch, length, limits)


def reaching(config: LlamaConfig, positions: Iterable[Array | None]) -> LlamaConfig:
    """Return the config, its max_seq_len above all the positions."""
    lengths = [int(given.max()) + 1 for given in positions if given is not None]
    return replace(config, max_seq_len=max([config.max_seq_len, *lengths]))


def within_context(case: "Case") -> "Case":
    """Return the case with a max_seq_len above all of its positions."""
    return case._replace(config=reaching(case.config, [case.positions]))


@composite
def cases(draw: Draw, masked: bool = True, limits: Limits = UNLIMITED) -> Case:
    """Draw a call without a cache: positions and mask arbitrary or None; None unless ``masked``."""
    config = draw(configs(limits=limits))
    tokens = draw(tokens_for(config, limits=limits))
    batch, length = tokens.shape
    positions = draw(optional_positions(batch, length, limits)) if masked else None
    free = masked and limits.masks in FREE_MASKS
    mask = draw(st.none() | masks(batch, length, length)) if free else None
    case = Case(config, draw(params_for(config)), tokens, positions, mask, draw.numbers)
    return within_context(case)


def with_diagonal(mask: Array) -> Array:
    """Return the mask [B, T, S] in which every query may also attend to its own key.

    The output of a query that may attend to no key is not defined by any convention.
    """
    n_queries, n_keys = mask.shape[1:]
    return mask | np.eye(n_queries, n_keys, n_keys - n_queries, dtype=bool)


@composite
def wide_cases(draw: Draw, for_transformers: bool = False, limits: Limits = UNLIMITED) -> Case:
    """Draw a call wide and well conditioned enough to compare low precision by root mean squares.

    Attention scores stay near one. With large scores the rounding of one score would change a
    whole token, and the ratio of two correct implementations' errors, each a single draw, has no
    useful bound.
    """
    n_kv_heads = draw(st.integers(1, 3), label="n_kv_heads")
    n_heads = n_kv_heads * draw(st.integers(1, 4), label="n_rep")
    if limits.head_dim != "dim / n_heads":
        always = for_transformers or limits.head_dim != "any"
        aligned = always or draw(st.booleans(), label="dim a multiple of n_heads")
        step = n_heads if aligned else 1
        dim = step * draw(st.integers(-(-48 // step), 96 // step), label="dim / step")
        head_dim = draw(st.sampled_from([32, 48, 64]), label="head_dim")
    else:
        widths = [width for width in (16, 32, 48, 64) if 48 <= width * n_heads <= 256]
        head_dim = draw(st.sampled_from(widths), label="head_dim")
        dim = n_heads * head_dim
    config = LlamaConfig(
        dim=dim,
        n_layers=draw(st.integers(1, 4), label="n_layers"),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        hidden_dim=draw(st.integers(64, 160), label="hidden_dim"),
        vocab_size=draw(st.integers(100, 300), label="vocab_size"),
        rope_theta=draw(st.sampled_from([1e4, 5e5]), label="rope_theta"),
        **common_fields(draw, limits),
    )
    tokens = draw(tokens_for(config, min_length=8, limits=limits))
    positions = draw(optional_positions(*tokens.shape, limits))
    params = random_params(config, draw(seeds, label="weights seed"))
    for name, value in params.items():
        if "q_proj" in name:
            value /= 2
    return within_context(Case(config, params, tokens, positions, None, draw.numbers))


@composite
def long_cases(draw: Draw, limits: Limits = UNLIMITED) -> Case:
    """Draw a causal call of up to 300 tokens in one row, within the context.

    Past what bugs of a port depend on: blocks of 16 to 256 keys, a window, a mask or a table of
    angles that ends, a cache that grows, positions that bfloat16 holds to 256.
    """
    case = draw(wide_cases(limits=replace(limits, positions="consecutive", batch=1)))
    lengths = [length for length in (40, 150, 300) if length <= (limits.context or length)]
    length = draw(st.sampled_from(lengths or [limits.context]), label="long length")
    rng = np.random.default_rng(draw(seeds, label="long tokens seed"))
    return case._replace(tokens=rng.integers(0, case.config.vocab_size, (1, length)))


@composite
def chunk_sizes(draw: Draw, length: int, limits: Limits = UNLIMITED) -> list[int]:
    """Draw the sizes of consecutive chunks, which sum to ``length``."""
    if limits.appended == "one token":
        prompt = draw(st.integers(1, length), label="prompt")
        return [prompt] + [1] * (length - prompt)
    cuts = draw(st.sets(st.integers(1, length - 1)), label="cuts") if length > 1 else set()
    edges = [0, *sorted(cuts), length]
    return [end - start for start, end in itertools.pairwise(edges)]


def unmasked_cases_for(dtype: str, limits: Limits = UNLIMITED) -> st.SearchStrategy[Case]:
    """Return the strategy of cases without mask and positions: in float64 any, else wide ones."""
    if dtype == "float64":
        return cases(masked=False, limits=limits)
    return wide_cases(limits=replace(limits, positions="consecutive"))


@composite
def cases_for(draw: Draw, dtype: str, limits: Limits = UNLIMITED) -> Case:
    """Draw a case for a precision, with a mask by which every query may attend to itself."""
    case = draw(cases(limits=limits) if dtype == "float64" else wide_cases(limits=limits))
    mask, free = case.mask, limits.masks in FREE_MASKS
    if mask is None and dtype != "float64" and free and draw(st.booleans(), label="masked"):
        mask = draw(masks(*case.tokens.shape, case.tokens.shape[1]))
    if mask is None:
        return case
    mask = with_diagonal(mask)
    return case._replace(mask=mask if limits.masks == "any" else np.tril(mask))


def padded(lengths: list[int], left: bool) -> tuple[Array, Array, Array]:
    """Return positions [B, T], mask [B, T, T] and real [B, T] of rows padded to one length.

    ``real`` is False for padding. A token may attend to the real tokens up to itself, padding also
    to itself. Padding is on the left or on the right.
    """
    longest = max(lengths)
    column = np.arange(longest)
    start = longest - np.array(lengths)[:, None] if left else np.zeros((len(lengths), 1), int)
    end = start + np.array(lengths)[:, None]
    real = (column >= start) & (column < end)
    causal = np.tril(np.ones((longest, longest), bool))
    mask = with_diagonal(causal & real[:, None, :])
    return np.clip(column - start, 0, None), mask, real


def packed(lengths: list[int]) -> tuple[Array, Array]:
    """Return positions [1, T] and block-diagonal causal mask [1, T, T] of packed documents."""
    document = np.repeat(np.arange(len(lengths)), lengths)
    positions = np.concatenate([np.arange(n) for n in lengths])
    same = document[:, None] == document[None, :]
    return positions[None], (np.tril(same))[None]


def cast(params: Params, dtype: Any) -> Params:
    """Return the parameters rounded to ``dtype``."""
    return {name: value.astype(dtype) for name, value in params.items()}


def caches_equal(left: Cache, right: Cache) -> bool:
    """Return whether two caches are equal element for element."""
    pairs = zip(left.keys + left.values, right.keys + right.values, strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)
