"""llama.cpp through llama-cpp-python, an engine that owns its cache and reads a GGUF file.

Tested with llama_cpp_python 0.3.36 and gguf 0.19.0
(``pip install llama_cpp_python gguf``; no wheel: it compiles for minutes). The file is written by
``gguf``, with q and k permuted as convert_hf_to_gguf does. Cache and weights are float32 and
flash attention is off: with it, or with the default float16 cache, logits err by 1e-4.
"""

import tempfile
from collections.abc import Sequence
from typing import Any

import gguf
import llama_cpp
import numpy as np

from reference_np.limits import Limits
from reference_np.ops import rope_frequencies

REQUIRES = ("llama_cpp_python==0.3.36", "gguf==0.19.0")
LENGTH = 320  # positions of one sequence
QUIET = llama_cpp.llama_log_callback(lambda *_: None)
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def tensor_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in TOP:
        return f"{TOP[stem]}.weight"
    _, _, layer, kind = stem.split(".", 3)
    return f"blk.{layer}.{LAYER[kind]}.weight"


def paired(weight: Any, n_heads: int) -> Any:
    """Return q's or k's rows in the order of rotation of neighbouring pairs."""
    halves = weight.reshape(n_heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def write(path: str, config: Any, params: Any) -> None:
    file = gguf.GGUFWriter(path, "llama")
    file.add_context_length(config.max_seq_len)
    file.add_embedding_length(config.dim)
    file.add_block_count(config.n_layers)
    file.add_feed_forward_length(config.hidden_dim)
    file.add_head_count(config.n_heads)
    file.add_head_count_kv(config.n_kv_heads)
    file.add_key_length(config.head_dim)
    file.add_value_length(config.head_dim)
    file.add_rope_dimension_count(config.head_dim)
    file.add_rope_freq_base(config.rope_theta)
    file.add_layer_norm_rms_eps(config.norm_eps)
    file.add_vocab_size(config.vocab_size)
    file.add_tokenizer_model("none")
    if config.rope_type == "linear":
        file.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        file.add_rope_scaling_factor(config.rope_factor)
    if config.rope_type == "llama3":
        plain = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
        factors = plain / rope_frequencies(config)
        file.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    for name, value in params.items():
        heads = {"q_proj": config.n_heads, "k_proj": config.n_kv_heads}
        n_heads = heads.get(name.split(".")[-2])
        file.add_tensor(tensor_name(name), paired(value, n_heads) if n_heads else value)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


class Engine:
    """A model and a context of several sequences."""

    def __init__(self, config: Any, params: Any, n_rows: int) -> None:
        llama_cpp.llama_log_set(QUIET, None)
        with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
            write(file.name, config, params)
            self.model = llama_cpp.llama_model_load_from_file(
                file.name.encode(), llama_cpp.llama_model_default_params()
            )
        if not self.model:
            raise ValueError("llama.cpp does not load the file")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch = LENGTH * n_rows, LENGTH * n_rows
        settings.n_seq_max, settings.n_threads, settings.n_threads_batch = n_rows, 1, 1
        settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
        settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        self.vocab_size, self.lengths = config.vocab_size, [0] * n_rows

    def __del__(self) -> None:
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)

    def append(self, rows: Sequence[Any]) -> list[Any]:
        """Append tokens to every sequence; return the logits [T, V] of each."""
        count = sum(map(len, rows))
        batch, i = llama_cpp.llama_batch_init(count, 0, 1), 0
        for row, tokens in enumerate(rows):
            for token in tokens:
                batch.token[i], batch.pos[i] = int(token), self.lengths[row]
                batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, row, 1
                self.lengths[row], i = self.lengths[row] + 1, i + 1
        batch.n_tokens = count
        if llama_cpp.llama_decode(self.context, batch):
            raise ValueError("llama_decode failed")
        out = llama_cpp.llama_get_logits(self.context)
        logits = np.ctypeslib.as_array(out, (count, self.vocab_size)).copy()
        llama_cpp.llama_batch_free(batch)
        return np.split(logits, np.cumsum([len(row) for row in rows])[:-1])


class Port:
    """Sequences of a context, and their logits."""

    dtypes = ("float32",)
    limits = Limits(
        masks="causal",
        positions="shifted",
        cache="engine",
        float32_angles=("float32",),
        float32_epsilon=True,
    )

    def logits(self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any) -> Any:
        engine = Engine(config, params, len(tokens))
        if positions is not None:
            engine.lengths = positions[:, 0].tolist()
        return np.stack(engine.append(tokens))

    def start(self, config: Any, params: Any, rows: Sequence[Any]) -> Any:
        self.engine = Engine(config, params, len(rows))
        return self.append(rows)

    def append(self, tokens: Any) -> Any:
        return np.stack([logits[-1] for logits in self.engine.append(tokens)])
