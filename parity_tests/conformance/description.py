"""One line about a config, a call or an error, for the report of a failure."""

from typing import Any

from reference_np.config import ROPE_USES, LlamaConfig

USUAL_EPSILON, USUAL_THETA = 1e-5, 1e4


def describe_config(config: LlamaConfig) -> str:
    """Return every field, those that differ from the first Llama's first, then a bar."""
    derived = config.dim / config.n_heads
    scaling = "".join(f" {key}={getattr(config, key):g}" for key in ROPE_USES[config.rope_type])
    fields = [
        (config.head_dim != derived, f"head_dim={config.head_dim} (dim / n_heads = {derived:g})"),
        (config.rope_type != "default", f"rope_type={config.rope_type}{scaling}"),
        (config.n_kv_heads != config.n_heads, f"n_kv_heads={config.n_kv_heads}"),
        (config.tie_embeddings, f"tie_embeddings={config.tie_embeddings}"),
        (config.norm_eps != USUAL_EPSILON, f"norm_eps={config.norm_eps:g}"),
        (config.rope_theta != USUAL_THETA, f"rope_theta={config.rope_theta:g}"),
        (False, f"n_heads={config.n_heads} dim={config.dim} n_layers={config.n_layers}"),
        (False, f"hidden_dim={config.hidden_dim} vocab_size={config.vocab_size}"),
        (False, f"max_seq_len={config.max_seq_len}"),
    ]
    unusual = " ".join(text for is_unusual, text in fields if is_unusual)
    usual = " ".join(text for is_unusual, text in fields if not is_unusual)
    return f"{unusual} | {usual}" if unusual else usual


def describe_call(method: str, arguments: tuple[Any, ...]) -> str:
    """Return a method and the shapes of its arguments after config and params."""
    if method in ("loss_and_grads", "train"):
        batches = "; ".join(_inputs(b.tokens, b.positions, b.mask) for b in arguments[0])
        return f"{method}: {len(arguments[0])} batches: {batches}"
    if method == "start":
        return f"start: rows of {', '.join(str(len(row)) for row in arguments[0])} tokens"
    if method == "append":
        return f"append: tokens {list(arguments[0].shape)}"
    tokens, positions, mask, *cache = arguments
    after = ", continuing a cache" if cache and cache[0] is not None else ""
    return f"{method}: {_inputs(tokens, positions, mask)}{after}"


def _inputs(tokens: Any, positions: Any, mask: Any) -> str:
    placed = (
        "positions None"
        if positions is None
        else f"positions {int(positions.min())} to {int(positions.max())}"
    )
    seen = "mask None" if mask is None else f"mask {list(mask.shape)}, {mask.mean():.0%} True"
    return f"tokens {list(tokens.shape)}, {placed}, {seen}"


def describe_error(error: BaseException) -> str:
    """Return an error's type and text."""
    return " ".join(f"{type(error).__name__}: {error}".split())
