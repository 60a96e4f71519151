"""A Llama as a GGUF file, which llama_cpp, node_llama_cpp and tinygrad read.

It is written by ``gguf``, with q and k permuted as convert_hf_to_gguf does, and the scaling llama3
as the divisors that it makes of it.
"""

from typing import Any

import gguf
import numpy as np

from reference_np.ops import rope_frequencies

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


def write(
    path: str, config: Any, params: Any, has_words: bool = False, tokenizer: str = "llama"
) -> None:
    """Write a model as a GGUF file; ``has_words``: with a vocabulary, which some readers want.

    ``tokenizer``: its kind, "llama" or "gpt2"; the latter splits a text without pieces for bytes.
    """
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
    file.add_tokenizer_model(tokenizer if has_words else "none")
    if has_words:
        special = [(b"<unk>", 2), (b"<s>", 3), (b"</s>", 3), (b"<0x0A>", 6)][: config.vocab_size]
        words = special + [(f"w{i}".encode(), 1) for i in range(len(special), config.vocab_size)]
        file.add_tokenizer_pre("llama-bpe")
        file.add_token_list([word for word, _ in words])
        file.add_token_scores([0.0] * config.vocab_size)
        file.add_token_types([kind for _, kind in words])
        if tokenizer == "gpt2":
            file.add_token_merges(["w 0"])
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
