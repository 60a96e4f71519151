"""``llama-parity test --new FILE.py``: a port to fill in."""

import keyword
from pathlib import Path

from llama_common.errors import InputError
from llama_common.hidden_modules import require_hides_nothing

SKELETON = '''\
"""My Llama as llama-parity sees it: NumPy arrays in, NumPy arrays out.

    llama-parity test {file}:Port --basic            is the adapter right?
    llama-parity test {file}:Port --profile quick    a short run; without it the whole one
"""

import numpy as np

from reference_np.limits import Limits


class Port:
    """My implementation."""

    # The precisions it computes in, most precise first. With "float64" nothing hides in rounding.
    dtypes = ("float32",)

    # What it supports: examples are drawn inside. Widen it where yours supports more.
    limits = Limits(
        head_dim="dim / n_heads",  # or "any": config.head_dim is read
        masks="causal",  # or "left padding", "right padding", "padding", "any"
        positions="consecutive",  # or "shifted", "any"
        cache="none",  # or "value", "in place": then add decode (reference_np/backend.py)
        rope_types=("default",),  # Llama 2's; also "linear", "llama3"
        float32_angles=("float32",),  # () where position times frequency is wider than float32
    )

    def logits(self, config, params, tokens, positions, mask):
        """Return the logits [B, T, V] of every position, a NumPy array of floats.

        config     dim, n_layers, n_heads, n_kv_heads, head_dim, hidden_dim, vocab_size,
                   norm_eps (not always 1e-5), rope_theta (not always 10000), tie_embeddings
        params     Hugging Face's names -> arrays [out, in]; without lm_head.weight where tied
        tokens     int64 [B, T]; positions and mask are None inside these limits
        """
        # NumPy:
        #     return my_llama.forward(params, tokens, n_heads=config.n_heads, ...)
        # PyTorch:
        #     model = MyLlama(...sizes of config...)
        #     model.load_state_dict({{n: torch.from_numpy(v.copy()) for n, v in params.items()}})
        #     with torch.no_grad():
        #         return model(torch.from_numpy(tokens)).float().numpy()
        batch, length = tokens.shape
        logits = np.zeros((batch, length, config.vocab_size), np.float32)
        raise NotImplementedError(f"fill in logits, {{logits.shape}} here")
'''


def write_skeleton(name: str) -> str:
    """Write a port to fill in to a new file; return the command that tests it.

    Raises InputError where the name is no module's or hides another module, or where the file is
    there already or cannot be written.
    """
    path = Path(name)
    if path.suffix != ".py" or not path.stem.isidentifier() or keyword.iskeyword(path.stem):
        raise InputError(f"--new {name}: give the name of a Python module, as my_llama.py")
    require_hides_nothing(path, f"--new {name}")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(SKELETON.format(file=path.name))
    except FileExistsError:
        raise InputError(f"--new {name}: exists already, and is left as it is") from None
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"--new {name}: there is no directory {path.parent}") from None
    except OSError as error:
        raise InputError(f"--new {name}: cannot be written ({error.strerror})") from None
    return f"llama-parity test {name}:Port"
