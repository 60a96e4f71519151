"""Ports in NumPy as outsiders write them, each with limits of its own, and each with planted bugs.

They share one small Llama, in which each hook is a place for a bug.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from reference_np.limits import Limits

from ..backends.mixins import LogitsByEngine

F32 = np.float32


class Small:
    """A Llama 2 in NumPy: derived head_dim, causal, consecutive positions, no cache."""

    dtypes: Sequence[str] = ("float64", "float32")
    limits = Limits(
        head_dim="dim / n_heads",
        masks="causal",
        positions="consecutive",
        rope_types=("default",),
        cache="none",
        context=2048,
    )

    def logits(self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any) -> Any:
        if positions is not None or mask is not None:
            raise ValueError("a call outside the declared limits")
        return self.run(config, params, tokens, None, None)

    def epsilon(self, config: Any) -> float:
        return config.norm_eps

    def head_dim(self, config: Any) -> int:
        return config.dim // config.n_heads

    def frequencies(self, config: Any) -> Any:
        return config.rope_theta ** (-np.arange(0, self.head_dim(config), 2) / config.head_dim)

    def angles(self, config: Any, positions: Any) -> Any:
        return positions[..., None] * self.frequencies(config)

    def repeat(self, heads: Any, n_rep: int) -> Any:
        return np.repeat(heads, n_rep, axis=2)

    def run(
        self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any, past: Any = None
    ) -> Any:
        """Return the logits [B, T, V]; ``past``, a list of layers' keys and values, grows."""
        past = [None] * config.n_layers if past is None else past
        start, length = (0 if past[0] is None else past[0][0].shape[1]), tokens.shape[1]
        if positions is None:
            positions = self.next_positions(start, length)
        if mask is None:
            mask = np.tril(np.ones((1, length, start + length), bool), start)
        x = params["model.embed_tokens.weight"][tokens]
        tables = [f(self.angles(config, positions))[:, :, None] for f in (np.cos, np.sin)]
        tables = [table.astype(x.dtype) for table in tables]
        for i in range(config.n_layers):
            layer = {
                name.split(".")[-2]: value
                for name, value in params.items()
                if name.startswith(f"model.layers.{i}.")
            }
            h = self.norm(config, x, layer["input_layernorm"])
            q, k, v = (
                (h @ layer[f"{n}_proj"].T).reshape(*h.shape[:2], -1, self.head_dim(config))
                for n in "qkv"
            )
            q, k = (turn(part, *tables) for part in (q, k))
            if past[i] is not None:
                k, v = (np.concatenate(p, axis=1) for p in zip(past[i], (k, v), strict=True))
            past[i] = k, v
            k, v = (self.repeat(part, config.n_heads // config.n_kv_heads) for part in (k, v))
            scores = np.einsum("bthk,bshk->bhts", q, k) / q.shape[-1] ** 0.5
            scores = np.where(mask[:, None], scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            mixed = np.einsum("bhts,bshk->bthk", weights, v)
            x = x + mixed.reshape(*h.shape[:2], -1) @ layer["o_proj"].T
            h = self.norm(config, x, layer["post_attention_layernorm"])
            gate = h @ layer["gate_proj"].T
            x = x + (gate / (1 + np.exp(-gate)) * (h @ layer["up_proj"].T)) @ layer["down_proj"].T
        head = params.get("lm_head.weight", params["model.embed_tokens.weight"])
        return self.norm(config, x, params["model.norm.weight"]) @ head.T

    def next_positions(self, start: int, length: int) -> Any:
        return np.arange(start, start + length)[None]

    def norm(self, config: Any, x: Any, weight: Any) -> Any:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.epsilon(config)) * weight


def turn(x: Any, cos: Any, sin: Any) -> Any:
    """Rotate the halves of the last axis."""
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class SmallWithFixedEpsilon(Small):
    """Epsilon written into the code."""

    def epsilon(self, config: Any) -> float:
        return 1e-5


class SmallWithFixedEpsilonInFloat32(SmallWithFixedEpsilon):
    """Epsilon written into code that computes in float32 alone."""

    dtypes = ("float32",)


class SmallWithTiledHeads(Small):
    """Key heads repeated in the wrong order."""

    def repeat(self, heads: Any, n_rep: int) -> Any:
        return np.tile(heads, (1, 1, n_rep, 1))


class Engine(Small, LogitsByEngine):
    """An engine that owns its cache, one row after the other."""

    limits = Limits(head_dim="dim / n_heads", masks="causal", positions="consecutive",
                    rope_types=("default",), cache="engine")  # fmt: skip
    logits = LogitsByEngine.logits

    def start(self, config: Any, params: Any, rows: Any) -> Any:
        self.model, self.pasts = (config, params), [[None] * config.n_layers for _ in rows]
        return self.continued(rows)

    def append(self, tokens: Any) -> Any:
        return self.continued(tokens)

    def continued(self, rows: Any) -> Any:
        last = [
            self.run(*self.model, row[None], None, None, past)[0, -1]
            for row, past in zip(rows, self.pasts, strict=True)
        ]
        return np.stack(last)


class EngineOfOldPrompts(Engine):
    """An engine whose start keeps the sequences before it, where there were as many rows."""

    pasts: Any = ()

    def start(self, config: Any, params: Any, rows: Any) -> Any:
        older = self.pasts
        if len(older) != len(rows) or self.model[1] is not params:
            return super().start(config, params, rows)
        return self.continued(rows)


class EngineOneLate(Engine):
    """An engine that decodes from one position too far."""

    def next_positions(self, start: int, length: int) -> Any:
        return np.arange(start, start + length)[None] + (start > 0)


class Float32EpsilonUndeclared(Small):
    """Epsilon stored in float32, as in ONNX and GGUF files."""

    def epsilon(self, config: Any) -> float:
        return float(F32(config.norm_eps))


class Float32Epsilon(Float32EpsilonUndeclared):
    """The same port, which declares it."""

    limits = replace(Small.limits, float32_epsilon=True)


class Float32Angles(Small):
    """Any positions and masks, rotary scaling; angles are products in float32, as in many ports."""

    limits = Limits(cache="none", float32_angles=("float64", "float32"))

    def logits(self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any) -> Any:
        return self.run(config, params, tokens, positions, mask)

    def head_dim(self, config: Any) -> int:
        return config.head_dim

    def frequencies(self, config: Any) -> Any:
        exponent = np.arange(0, config.head_dim, 2, dtype=F32) / F32(config.head_dim)
        plain = F32(1) / F32(config.rope_theta) ** exponent
        if config.rope_type == "default":
            return plain
        slow = plain / F32(config.rope_factor)
        if config.rope_type == "linear":
            return slow
        low, high = F32(config.rope_low_freq_factor), F32(config.rope_high_freq_factor)
        turns = F32(config.rope_original_max_seq_len) * plain / F32(2 * np.pi)
        kept = np.clip((turns - low) / (high - low), F32(0), F32(1))
        return kept * plain + (F32(1) - kept) * slow

    def angles(self, config: Any, positions: Any) -> Any:
        return positions[..., None].astype(F32) * self.frequencies(config)


class Float32AnglesUndeclared(Float32Angles):
    """The same port without the declaration: it fails."""

    limits = Limits(cache="none")


class Float32AnglesWithBfloat16Frequencies(Float32Angles):
    """Frequencies in bfloat16, by cutting the lower bits of float32."""

    def frequencies(self, config: Any) -> Any:
        bits = super().frequencies(config).view(np.uint32)
        return (bits & np.uint32(0xFFFF0000)).view(F32)


class Float32AnglesWithPositionsOneLate(Float32Angles):
    """Positions that are given count from one."""

    def angles(self, config: Any, positions: Any) -> Any:
        late = positions + np.arange(positions.shape[1])[::-1] % 2
        return super().angles(config, late)


class OneTokenEach(Small):
    """A port that continues a sequence by one token a row and refuses more."""

    limits = replace(Small.limits, masks="left padding", cache="value", appended="one token")

    def decode(
        self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any, cache: Any
    ) -> Any:
        if cache is not None and tokens.shape[1] > 1:
            raise ValueError("a call outside the declared limits")
        past = [None] * config.n_layers if cache is None else list(cache)
        return self.run(config, params, tokens, positions, mask, past), past

    def logits(self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any) -> Any:
        return self.run(config, params, tokens, positions, mask)


class RefusesEverything(Small):
    """A port that declares no limits, and computes one kind of call in a hundred."""

    limits = Limits()

    def logits(self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any) -> Any:
        if config.head_dim * config.n_heads != config.dim or config.rope_type != "default":
            raise NotImplementedError("head_dim is dim / n_heads here")
        if positions is not None or mask is not None:
            raise NotImplementedError("neither positions nor a mask")
        return self.run(config, params, tokens, None, None)


class Talkative(SmallWithFixedEpsilon):
    """A port with a bug, which prints a line for each call."""

    calls = 0

    def epsilon(self, config: Any) -> float:
        self.calls += 1
        print(f"this port computes norm {self.calls}")
        return super().epsilon(config)


class WithoutEngine(Small):
    """A port that declares an engine and has none."""

    limits = Limits(cache="engine")


class WithWrongLimits(Small):
    """A port whose limits are of another type."""

    limits: Any = "causal"


class WithAnglesInAnotherPrecision(Small):
    """A port that declares float32 angles of a precision that it does not compute in."""

    limits = Limits(float32_angles=("bfloat16",))


class Refusing(Small):
    """A port whose library raises NotImplementedError."""

    def logits(self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any) -> Any:
        return abstract_method_of_a_library()


def abstract_method_of_a_library() -> Any:
    """Raise NotImplementedError in a module of the standard library."""
    import asyncio

    return asyncio.AbstractEventLoop().time()
