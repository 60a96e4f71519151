"""Settings of inference: of sampling, of loading a checkpoint, of decoding."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from llama_common.errors import InputError, check, check_positive, check_text, check_types

Dtype = Literal["float32", "bfloat16", "float16", "float64"]

Quantize = Literal["none", "int8", "int4"]

Decoding = Literal["auto", "eager", "native", "numpy", "graph", "compiled", "kernels"]

PREFILL_CHUNK = 512


def check_choice(name: str, value: object, kind: Any) -> None:
    """Raise InputError unless ``value`` is one of the values of ``kind``, a Literal."""
    if value not in get_args(kind):
        raise InputError(f"{name} {value!r} is not one of {', '.join(get_args(kind))}")


def check_chunk(size: int) -> None:
    """Raise InputError unless ``size``, the tokens of a prefill chunk, is in [1, 2^31)."""
    check(0 < size < 2**31, "prefill_chunk", size, "must be positive and below 2^31")


def check_rows(number: int) -> None:
    """Raise InputError unless ``number``, the prompts continued at a time, is in [0, 2^31)."""
    check(0 <= number < 2**31, "max_rows", number, "must be zero (all) or positive, below 2^31")


@dataclass(frozen=True)
class SamplingConfig:
    """Settings of one request: the distribution to sample from, the seed, when to stop.

    The order in which they apply is in sampling.py. Raises InputError for a value out of range.
    """

    max_new_tokens: int = 128
    """Maximum number of new tokens."""
    temperature: float = 0.8
    """Divisor of the logits; 0 = greedy."""
    top_k: int = 0
    """Sample from the k most probable tokens; 0 = all."""
    top_p: float = 0.95
    """Sample from the fewest most probable tokens whose probabilities sum to this; 1 = all."""
    min_p: float = 0.0
    """Sample from tokens of at least this times the largest probability; 0 = all."""
    repetition_penalty: float = 1.0
    """Divisor of positive logits of tokens already seen, factor of negative ones; 1 = none."""
    seed: int = 0
    """Seed of the samples; prompt i of several has seed + i."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer, and are left out of it: the first that is complete ends it."""
    stop_tokens: tuple[str, ...] = ()
    """Tokens that end the answer, besides the checkpoint's own end tokens."""
    ignore_eos: bool = False
    """Continue after the checkpoint's own end tokens."""
    logprobs: int = -1
    """Report each token's log-probability, and those of the n most probable; -1 = none."""

    def __post_init__(self) -> None:
        for name in ("stop", "stop_tokens"):
            given = getattr(self, name)
            texts = (given,) if isinstance(given, str) else given
            are_texts = isinstance(texts, list | tuple) and all(type(t) is str for t in texts)
            check(are_texts, name, given, "must be texts")
            object.__setattr__(self, name, tuple(texts))
        check_types(self)
        check_positive(self, "max_new_tokens")
        for name in ("max_new_tokens", "top_k", "logprobs"):
            check(getattr(self, name) < 2**31, name, getattr(self, name), "must be below 2^31")
        penalty = self.repetition_penalty
        between = "must lie between 0.01 and 100"
        check(0.01 <= penalty <= 100, "repetition_penalty", penalty, between)
        check(
            0 <= self.temperature < 1e300,
            "temperature",
            self.temperature,
            "must be zero (greedy) or positive",
        )
        check(self.top_k >= 0, "top_k", self.top_k, "must be zero (all) or positive")
        check(0 < self.top_p <= 1, "top_p", self.top_p, "must be above 0 and at most 1")
        check(0 <= self.min_p <= 1, "min_p", self.min_p, "must be between 0 and 1")
        check(0 <= self.seed < 2**63, "seed", self.seed, "must lie between 0 and 2^63 - 1")
        check(self.logprobs >= -1, "logprobs", self.logprobs, "must be -1 (none) or more")
        for name in ("stop", "stop_tokens"):
            for text in getattr(self, name):
                check_text(name, text)


@dataclass(frozen=True)
class LoadConfig:
    """Settings of loading a model: its checkpoint, device and precision."""

    ckpt: str
    """Model directory or .safetensors file."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the model; auto = a GPU if there is one."""
    dtype: Dtype = "float32"
    """Precision of the weights in memory."""
    quantize: Quantize = "none"
    """int8 = matrices as int8 with a scale for each row, half of bfloat16's memory; int4 = with a
    scale for each 64 columns of a row, some quarter of it."""

    def __post_init__(self) -> None:
        check(
            bool(self.ckpt), "ckpt", self.ckpt, "must name a model directory or .safetensors file"
        )
        check_choice("dtype", self.dtype, Dtype)
        check_choice("quantize", self.quantize, Quantize)


@dataclass(frozen=True)
class DecodingConfig:
    """Settings of decoding: none of them changes the tokens, rounding aside."""

    decoding: Decoding = "auto"
    """Mode of the decoding steps; auto = the quickest for the device and the new tokens."""
    draft: str = ""
    """Draft model of the same vocabulary, for speculative decoding; empty = none."""
    guesses: int = 4
    """Draft tokens verified at a time."""

    def __post_init__(self) -> None:
        check_types(self)
        check_choice("decoding", self.decoding, Decoding)
        check(0 < self.guesses < 256, "guesses", self.guesses, "must lie between 1 and 255")
