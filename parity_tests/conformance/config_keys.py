"""The keys of config.json that matter, each in a config that the logits tell from others."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from reference_np.config import LlamaConfig

from .directories import VERSIONS


class Key(NamedTuple):
    """One key of config.json: the config that has it, and what the logits are without it."""

    version: str  # of transformers, whose form has the key
    config: LlamaConfig
    unread: Mapping[str, LlamaConfig]  # the key's other value in words -> the config with that
    changed: Mapping[str, Any] = {}  # keys of config.json that the form would write otherwise
    limit: str = ""  # the limit outside which the key has no meaning


# As many positions as show every frequency that the thresholds below part.
PLAIN = LlamaConfig(64, 2, 2, 2, 32, 48, 50, max_seq_len=64)
LENGTH = 16
SCALED = replace(
    PLAIN, rope_type="llama3", rope_factor=8.0, rope_original_max_seq_len=32, rope_theta=5e5
)
LINEAR = replace(PLAIN, rope_type="linear", rope_factor=4.0)


def _without(config: LlamaConfig, **fields: Any) -> dict[str, LlamaConfig]:
    """Return configs with each of a field's other values, by the value in words."""
    [(name, values)] = fields.items()
    return {f"{value:g}": replace(config, **{name: value}) for value in values}


def _keys() -> dict[str, Key]:
    found: dict[str, Key] = {}
    eps = replace(PLAIN, norm_eps=0.0625)  # float32 holds it
    grouped = replace(PLAIN, n_heads=4, n_kv_heads=2, head_dim=16)
    wide = replace(PLAIN, head_dim=48)
    for version in VERSIONS:
        place = "rope_parameters" if version == "5" else "rope_scaling"
        base = "rope_parameters.rope_theta" if version == "5" else "rope_theta"
        theta = replace(PLAIN, rope_theta=500.0)
        scaled = {"none": replace(SCALED, rope_type="default")}
        only = {
            "rms_norm_eps": Key(version, eps, _without(eps, norm_eps=(1e-5, 1e-6))),
            base: Key(version, theta, _without(theta, rope_theta=(1e4, 5e5))),
            "head_dim": Key(version, wide, {}, limit="head_dim"),
            "num_key_value_heads": Key(version, grouped, {}),
            f"{place}.rope_type linear": Key(
                version, LINEAR, {"none": PLAIN, **_without(LINEAR, rope_factor=(2.0, 8.0))}
            ),
            f"{place}.rope_type llama3": Key(version, SCALED, scaled),
        }
        for key, field, value, others in (
            ("factor", "rope_factor", 3.0, (8.0, 32.0)),
            ("low_freq_factor", "rope_low_freq_factor", 2.0, (1.0,)),
            ("high_freq_factor", "rope_high_freq_factor", 12.0, (4.0,)),
            ("original_max_position_embeddings", "rope_original_max_seq_len", 16, (8192, 64)),
        ):
            config = replace(SCALED, **{field: value})
            unread = _without(config, **{field: others})
            only[f"{place}.{key}"] = Key(version, config, unread)
        found |= {f"{key} (transformers {version})": one for key, one in only.items()}
    old = {"rope_scaling": {"type": "linear", "factor": 4.0}}
    found["rope_scaling.type (transformers 4)"] = Key("4", LINEAR, {"none": PLAIN}, old)
    absent = replace(PLAIN, rope_theta=1e4)
    found["rope_theta left out (transformers 4)"] = Key(
        "4", absent, _without(absent, rope_theta=(5e5,)), {"rope_theta": None}
    )
    tied = replace(PLAIN, tie_embeddings=True)
    found["tie_word_embeddings (transformers 5)"] = Key("5", tied, {}, limit="tied")
    return found


KEYS = _keys()
