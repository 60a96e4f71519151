"""transformers in the lowest precision alone, where the tolerance is widest."""

from reference_np.limits import Limits

from ..backends.transformers_backend import Transformers


class TransformersInBfloat16(Transformers):
    """It computes every directory that the suite holds for no plain Llama."""

    dtypes = ("bfloat16",)
    limits = Limits(head_dim="dim a multiple of n_heads", float32_angles=dtypes)
