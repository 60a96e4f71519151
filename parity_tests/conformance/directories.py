"""Model directories in Hugging Face's form, in the ways that they are written in practice."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from safetensors.numpy import save_file

from reference_np.config import ROPE_KEYS, ROPE_USES, LlamaConfig
from reference_np.foreign import INDEX_FILE, MODEL_FILE
from reference_np.naming import EMBED, LM_HEAD

from .drawn import Draw, composite

Array = np.ndarray[Any, Any]

STORED = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
}
ABSENT = object()  # the value of a key that is left out
VERSIONS = {"4": "4.57.6", "5": "5.23.0"}  # of transformers, by the form of config.json


class Form(NamedTuple):
    """How one model is written; every form of a model holds the same numbers.

    config     "4": rope_theta and rope_scaling, torch_dtype, as transformers 4 writes config.json;
               "5": rope_parameters and dtype, as transformers 5 does.
    stored     the dtype of the tensors.
    shards     1: one file; 2: two files and an index.
    optional   whether the keys that a file may leave out are there: head_dim where it is dim /
               n_heads, num_key_value_heads where it is num_attention_heads.
    null       whether such a key is there as null where it is left out.
    has_head   whether a tied head is stored beside the embedding.
    """

    config: str = "5"
    stored: str = "float32"
    shards: int = 1
    optional: bool = True
    null: bool = False
    has_head: bool = False

    def __str__(self) -> str:
        """Return the form in words, for the report of a failure."""
        files = "one file" if self.shards == 1 else "two shards and an index"
        keys = "" if self.optional else f", optional keys {'null' if self.null else 'left out'}"
        head = ", the tied head stored too" if self.has_head else ""
        return f"config.json as transformers {self.config}, {self.stored}, {files}{keys}{head}"


@composite
def forms(draw: Draw, config: LlamaConfig) -> Form:
    """Draw a form in which a model of ``config`` may be written."""
    optional = draw(st.booleans(), label="optional keys")
    return Form(
        config=draw(st.sampled_from(list(VERSIONS)), label="config.json of transformers"),
        stored=draw(st.sampled_from(list(STORED)), label="stored"),
        shards=draw(st.sampled_from([1, 2]), label="shards"),
        optional=optional,
        null=not optional and draw(st.booleans(), label="null"),
        has_head=config.tie_embeddings and draw(st.booleans(), label="tied head stored"),
    )


def end_token(vocab_size: int) -> int:
    """Return the id of the token that ends a text."""
    return min(2, vocab_size - 1)


def config_json(config: LlamaConfig, form: Form) -> dict[str, Any]:
    """Return the keys of config.json in a form."""
    end = end_token(config.vocab_size)
    hf = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": min(1, end),
        "eos_token_id": end,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.dim,
        "initializer_range": 0.02,
        "intermediate_size": config.hidden_dim,
        "max_position_embeddings": config.max_seq_len,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": config.n_heads,
        "num_hidden_layers": config.n_layers,
        "num_key_value_heads": config.n_kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "transformers_version": VERSIONS[form.config],
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
    derived = {
        "head_dim": config.head_dim * config.n_heads == config.dim,
        "num_key_value_heads": config.n_kv_heads == config.n_heads,
    }
    for key in (key for key, is_derived in derived.items() if is_derived and not form.optional):
        if form.null:
            hf[key] = None
        else:
            del hf[key]
    scaling = {ROPE_KEYS[field]: getattr(config, field) for field in ROPE_USES[config.rope_type]}
    kind = {"rope_type": config.rope_type}
    if form.config == "5":
        rope = {"rope_theta": config.rope_theta, **kind, **scaling}
        return hf | {"dtype": form.stored, "rope_parameters": rope}
    return hf | {
        "rope_scaling": kind | scaling if scaling else None,
        "rope_theta": config.rope_theta,
        "torch_dtype": form.stored,
    }


def write_directory(
    folder: Path,
    config: LlamaConfig,
    params: Mapping[str, Array],
    form: Form,
    changed: Mapping[str, Any] = {},
    more: Mapping[str, Array] = {},
) -> dict[str, Array]:
    """Write a model directory into an empty folder; return the stored parameters, in float64.

    ``changed`` replaces keys of config.json; ABSENT for a key leaves it out. ``more`` are further
    tensors of the files, in their own dtype.
    """
    hf = config_json(config, form) | changed
    hf = {key: value for key, value in hf.items() if value is not ABSENT}
    _write_json(folder / "config.json", hf)
    tokens = {key: hf[key] for key in ("bos_token_id", "eos_token_id")}
    version = {"transformers_version": VERSIONS[form.config]}
    _write_json(folder / "generation_config.json", {"_from_model_config": True} | tokens | version)
    _write_tokenizer(folder, config.vocab_size)
    stored = {name: value.astype(STORED[form.stored]) for name, value in params.items()}
    exact = {name: value.astype(np.float64) for name, value in stored.items()}
    if form.has_head:
        stored[LM_HEAD] = stored[EMBED].copy()
    stored |= more
    # safetensors' NumPy writer takes the memory of an array as it lies.
    stored = {name: np.ascontiguousarray(value) for name, value in stored.items()}
    if form.shards == 1:
        save_file(stored, folder / MODEL_FILE, {"format": "pt"})
        return exact
    names, weight_map = list(stored), {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{i:05}-of-00002.safetensors"
        save_file({name: stored[name] for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(value.nbytes for value in stored.values())
    _write_json(folder / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": weight_map})
    return exact


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a tokenizer of one word for each id: some loaders want one beside the weights."""
    words = {f"w{i}": i for i in range(vocab_size)}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "w0"}
    ids = {"unk": 0, "bos": min(1, vocab_size - 1), "eos": end_token(vocab_size)}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = [
        {"id": i, "content": f"w{i}", **plain, "special": True} for i in sorted({*ids.values()})
    ]
    parts = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    split = {"type": "WhitespaceSplit"}
    made = {
        "version": "1.0",
        **parts,
        "added_tokens": special,
        "pre_tokenizer": split,
        "model": model,
    }
    _write_json(folder / "tokenizer.json", made)
    names = {f"{name}_token": f"w{i}" for name, i in ids.items()}
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    _write_json(folder / "tokenizer_config.json", kind | names)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
