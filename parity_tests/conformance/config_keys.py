"""The keys of config.json that matter, each in a config that the logits tell from others."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from reference_np.config import LlamaConfig

from .directories import ABSENT, VERSIONS


class Key(NamedTuple):
    """One key of config.json: the config that has it, and what the logits are without it."""

    version: str  # of transformers, whose form has the key
    config: LlamaConfig
    unread: Mapping[str, LlamaConfig]  # the key's other value in words -> the config with that
    changed: Mapping[str, Any] = {}  # keys of config.json that the form would write otherwise
    is_key: bool = True  # false: every key has its usual value
    # Other keys' values in words -> the config with those: the key is read, another one is lost.
    lost: Mapping[str, LlamaConfig] = {}


# As many positions as show every frequency that the thresholds below part.
PLAIN = LlamaConfig(64, 2, 2, 2, 32, 48, 50, max_seq_len=64)
LENGTH = 16
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
        ("factor", "rope_factor", 3.5, (3.0, 8.0, 32.0)),
        ("low_freq_factor", "rope_low_freq_factor", 2.5, (1.0, 2.0)),
        ("high_freq_factor", "rope_high_freq_factor", 12.5, (4.0, 12.0)),
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
    return {named(key, version): one for key, one in found.items()}


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
    return found


KEYS = _keys()
