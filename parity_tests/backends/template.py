"""Copy this file, make ``logits`` call your implementation, and run the suite on it.

    pytest parity_tests/ --backend your_module:YourLlama

in the folder of your_module.py, with the path of parity_tests. The arguments are described in
reference_np.backend.Backend; so are from_directory (your own loader), decode, start and append,
trace, loss_and_grads and train, which you can add for more coverage.
parity_tests/backends/torch_port.py helps a port in PyTorch.
"""

from typing import Any

from reference_np.limits import Limits


class YourLlama:
    """One line about the implementation under test."""

    dtypes = ("float32",)  # what it computes in, most precise first
    # What it supports; widen it where yours supports more. All examples are drawn inside.
    limits = Limits(
        head_dim="dim / n_heads",  # or "any", where config.head_dim is read
        masks="causal",  # or "left padding", "right padding", "any"
        positions="consecutive",  # or "shifted", "any"
        rope_types=("default",),  # Llama 2's; Llama 3.1's is "llama3"
        float32_angles=("float32",),  # () where position times frequency is not float32
    )

    def logits(self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any) -> Any:
        """Return the logits [B, T, V], a NumPy array of floats.

        config has dim, n_layers, n_heads, n_kv_heads, hidden_dim, vocab_size, norm_eps (not
        always 1e-5), rope_theta (not always 10000) and tie_embeddings; beyond these limits also
        head_dim, max_seq_len, rope_type, rope_factor, rope_low_freq_factor,
        rope_high_freq_factor and rope_original_max_seq_len. Within these limits positions and
        mask are None.
        """
        raise NotImplementedError("call your implementation here")
