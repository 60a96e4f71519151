"""The keys of config.json that matter, each in a config that the logits tell from others.

Beside them, what real directories hold that must not change the logits.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from reference_np.config import LlamaConfig
from reference_np.naming import DERIVED_SUFFIX

from .directories import ABSENT, VERSIONS, Array, end_token

# As many positions as show every frequency that the thresholds below part.
LENGTH = 32
# Words of a key's failure where every directory fails: so that the key is right, or may be.
RIGHT_ALONE = ": is right; the logits are those with "
ALSO_PLAIN = "; a plain directory fails too, so it need not be this key"


class Key(NamedTuple):
    """One key of config.json: the config that has it, and what the logits are without it."""

    version: str  # of transformers, whose form has the key
    config: LlamaConfig
    unread: Mapping[str, LlamaConfig]  # the key's other value in words -> the config with that
    changed: Mapping[str, Any] = {}  # keys of config.json that the form would write otherwise
    is_key: bool = True  # false: every key has its usual value
    # Other keys' values in words -> the config with those: the key is read, another one is lost.
    lost: Mapping[str, LlamaConfig] = {}
    file: str = "config.json"  # what a failure is of
    length: int = LENGTH  # tokens
    stored: str = "float32"  # the dtype of the tensors
    more: Mapping[str, Array] = {}  # tensors of the file that are no parameters
    up_scale: float = 1.0  # of up_proj's weights; down_proj's are divided by it


PLAIN = LlamaConfig(64, 2, 2, 2, 32, 48, 50, max_seq_len=64)
PLAIN_NAME = "every key as in the first Llama"
SCALED = replace(
    PLAIN, rope_type="llama3", rope_factor=8.0, rope_original_max_seq_len=32, rope_theta=5e5
)
# Neither a base nor a factor that a reader may have of its own, or that an integer holds.
LINEAR = replace(PLAIN, rope_type="linear", rope_factor=2.5, rope_theta=500.0)
# Of the same shapes as PLAIN, and a head_dim that is not dim / n_kv_heads.
GROUPED = replace(PLAIN, n_heads=4, n_kv_heads=2, head_dim=16)
# A matrix that is transposed by mistake has the right shape.
SQUARE = replace(PLAIN, hidden_dim=64, vocab_size=64)
# Beyond the 2,048 positions that some code has tables of. Each frequency is a power of two, so that
# no product of a position and a frequency is rounded, in float32 neither.
LONG = LlamaConfig(32, 1, 1, 1, 32, 48, 50, max_seq_len=4096, rope_theta=65536.0)
LONG_LENGTH = 2100
LATER_KEYS = ("attention_bias", "attention_dropout", "mlp_bias", "pretraining_tp", "rope_scaling")
WEIGHTS = "the weights"
# As text, layer 10 comes before layer 2.
DEEP = replace(PLAIN, n_layers=11)


def _without(config: LlamaConfig, **fields: Any) -> dict[str, LlamaConfig]:
    """Return configs with each of a field's other values, by the value in words."""
    [(name, values)] = fields.items()
    return {f"{value:g}": replace(config, **{name: value}) for value in values}


def _others(config: LlamaConfig) -> dict[str, LlamaConfig]:
    """Return configs with other usual values of the keys, by key and value."""
    return {
        "rms_norm_eps 1e-06": replace(config, norm_eps=1e-6),
        "rope_theta 5e+05": replace(config, rope_theta=5e5),
        "tie_word_embeddings true": replace(config, tie_embeddings=True),
    }


def unrelated(key: Key) -> dict[str, LlamaConfig]:
    """Return a key's config with other usual values of keys that it is not about."""
    own = [key.config, *key.unread.values(), *key.lost.values()]
    return {value: config for value, config in _others(key.config).items() if config not in own}


def _unscaled(place: str) -> dict[str, LlamaConfig]:
    """Return configs of linear scaling without it, and of its place without anything read."""
    return {"no scaling": replace(LINEAR, rope_type="default"), f"no {place}": PLAIN}


def _lost(config: LlamaConfig) -> dict[str, LlamaConfig]:
    """Return scaled configs in which the base, the kind or the original context is another."""
    found = {"rope_theta 10000": replace(config, rope_theta=1e4)}
    if config.rope_type == "llama3":
        context = config.max_seq_len
        found["rope_type linear"] = replace(config, rope_type="linear")
        found[f"original_max_position_embeddings {context}, which is max_position_embeddings"] = (
            replace(config, rope_original_max_seq_len=context)
        )
    return found


def _of_version(version: str) -> dict[str, Key]:
    """Return the keys that config.json has in the form of one version, by name."""
    place = "rope_parameters" if version == "5" else "rope_scaling"
    base = "rope_parameters.rope_theta" if version == "5" else "rope_theta"
    eps = replace(PLAIN, norm_eps=0.0625)  # float32 holds it
    theta = replace(PLAIN, rope_theta=500.0)
    none = {"no scaling": replace(SCALED, rope_type="default"), f"no {place}": PLAIN}
    heads = replace(PLAIN, n_heads=4, n_kv_heads=4, head_dim=16)  # of the same shapes
    found = {
        PLAIN_NAME: Key(version, PLAIN, _others(PLAIN), is_key=False),
        "rms_norm_eps": Key(version, eps, _without(eps, norm_eps=(1e-5, 1e-6))),
        base: Key(version, theta, _without(theta, rope_theta=(1e4, 5e5))),
        "num_attention_heads": Key(version, heads, {"2": PLAIN}),
        "num_hidden_layers": Key(version, DEEP, {"2": PLAIN}),
        "vocab_size and intermediate_size as hidden_size": Key(version, SQUARE, {}),
        "head_dim": Key(version, replace(PLAIN, head_dim=48), {}),
        "num_key_value_heads": Key(version, GROUPED, {}),
        "tie_word_embeddings": Key(version, replace(PLAIN, tie_embeddings=True), {}),
        f"{place}.rope_type linear": Key(
            version,
            LINEAR,
            _unscaled(place) | _without(LINEAR, rope_factor=(2.0, 8.0)),
            lost=_lost(LINEAR),
        ),
        f"{place}.rope_type llama3": Key(version, SCALED, none, lost=_lost(SCALED)),
    }
    for key, field, value, others in (
        ("factor", "rope_factor", 1.5, (1.0, 2.0, 8.0, 32.0)),
        ("low_freq_factor", "rope_low_freq_factor", 2.5, (1.0, 2.0)),
        ("high_freq_factor", "rope_high_freq_factor", 6.5, (4.0, 6.0)),
        ("original_max_position_embeddings", "rope_original_max_seq_len", 16, (8192, 64)),
    ):
        config = replace(SCALED, **{field: value})
        unread = _without(config, **{field: others}) | none
        found[f"{place}.{key}"] = Key(version, config, unread, lost=_lost(config))
    for key, config in (("head_dim", GROUPED), ("num_key_value_heads", PLAIN)):
        found[f"{key} left out"] = Key(version, config, {}, {key: ABSENT})
        found[f"{key} null"] = Key(version, config, {}, {key: None})
    tied = {"true": replace(PLAIN, tie_embeddings=True)}
    found["tie_word_embeddings false"] = Key(version, PLAIN, tied)
    found["tie_word_embeddings left out"] = Key(
        version, PLAIN, tied, {"tie_word_embeddings": ABSENT}
    )
    found |= _harmless(version)
    return {named(key, version): one for key, one in found.items()}


def _harmless(version: str) -> dict[str, Key]:
    """Return what real files hold that changes no logits, by what it is."""
    end, base = end_token(PLAIN.vocab_size), int(PLAIN.rope_theta)
    whole = {"rope_parameters": {"rope_theta": base, "rope_type": "default"}}
    changes: dict[str, dict[str, Any]] = {
        "pad_token_id as eos_token_id": {"pad_token_id": end},
        "eos_token_id a list": {"eos_token_id": [end, end + 1]},
        "rope_theta an integer": whole if version == "5" else {"rope_theta": base},
        "dtype unlike the tensors'": {"dtype" if version == "5" else "torch_dtype": "float16"},
    }
    return {name: Key(version, PLAIN, {}, changed) for name, changed in changes.items()}


def named(key: str, version: str) -> str:
    """Return the name of a key in the form of one version."""
    return f"{key} (transformers {version})"


def _keys() -> dict[str, Key]:
    found = {name: key for version in VERSIONS for name, key in _of_version(version).items()}
    for name, kind in (("type", {}), ("type and rope_type", {"rope_type": "linear"})):
        old = {"rope_scaling": {"type": "linear", **kind, "factor": LINEAR.rope_factor}}
        found[named(f"rope_scaling.{name}", "4")] = Key(
            "4", LINEAR, _unscaled("rope_scaling"), old, lost=_lost(LINEAR)
        )
    found[named("rope_theta left out", "4")] = Key(
        "4", PLAIN, _without(PLAIN, rope_theta=(5e5,)), {"rope_theta": ABSENT}
    )
    found[named("keys left out that the first files lack", "4")] = Key(
        "4", PLAIN, {}, dict.fromkeys(LATER_KEYS, ABSENT)
    )
    found[named(f"max_position_embeddings {LONG.max_seq_len}", "5")] = Key(
        "5", LONG, {}, length=LONG_LENGTH
    )
    # Llama 2's own files hold the frequencies, without scaling and rounded.
    plain = LINEAR.rope_theta ** (-np.arange(0, LINEAR.head_dim, 2) / LINEAR.head_dim)
    buffers = {
        f"model.layers.{i}.self_attn{DERIVED_SUFFIX}": plain.astype(np.float16)
        for i in range(LINEAR.n_layers)
    }
    taken = {"the stored frequencies": replace(LINEAR, rope_type="default")}
    found[named("rotary_emb.inv_freq stored", "4")] = Key(
        "4", LINEAR, {}, lost=taken, file=WEIGHTS, more=buffers
    )
    found[named("bfloat16 numbers above 65504", "5")] = Key(
        "5", PLAIN, {}, file=WEIGHTS, stored="bfloat16", up_scale=2.0**20
    )
    return found


KEYS = _keys()


class Unsupported(NamedTuple):
    """A directory that is no plain Llama: what config.json has, and the tensors beside."""

    version: str  # of transformers
    changed: Mapping[str, Any]
    more: Mapping[str, Array] = {}
    config: LlamaConfig = PLAIN  # of the plain Llama that it is taken for


# More tokens than max_position_embeddings, from where dynamic scaling scales.
SHORT = replace(PLAIN, max_seq_len=8)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}


def _biases(names: Mapping[str, int]) -> dict[str, Array]:
    """Return biases of every layer's projections, large enough to change every logit."""
    rng = np.random.default_rng(0)
    return {
        f"model.layers.{i}.{name}.bias": rng.standard_normal(width).astype(np.float32)
        for i in range(PLAIN.n_layers)
        for name, width in names.items()
    }


def _unsupported() -> dict[str, Unsupported]:
    attention = dict.fromkeys((f"self_attn.{part}_proj" for part in "qkvo"), PLAIN.dim)
    feed_forward = {f"mlp.{part}_proj": PLAIN.hidden_dim for part in ("gate", "up")}
    feed_forward["mlp.down_proj"] = PLAIN.dim
    found = {}
    for version in VERSIONS:
        kinds = {
            "attention_bias true": Unsupported(
                version, {"attention_bias": True}, _biases(attention)
            ),
            "mlp_bias true": Unsupported(version, {"mlp_bias": True}, _biases(feed_forward)),
            "hidden_act gelu": Unsupported(version, {"hidden_act": "gelu"}),
        }
        for rope, config in ((YARN, PLAIN), (DYNAMIC, SHORT)):
            place = "rope_parameters" if version == "5" else "rope_scaling"
            whole = rope | ({"rope_theta": config.rope_theta} if version == "5" else {})
            name = f"{place}.rope_type {rope['rope_type']}"
            kinds[name] = Unsupported(version, {place: whole}, config=config)
        found |= {named(key, version): one for key, one in kinds.items()}
    return found


# What a reader of Llamas must not take for a plain one. They are computed or refused.
UNSUPPORTED = _unsupported()
