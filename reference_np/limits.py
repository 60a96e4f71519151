"""The limits that a backend declares: the inputs within which the suite draws its examples."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from .config import ROPE_USES, InputError, LlamaConfig

Array = NDArray[Any]

MASKS = ("any", "no later keys", "padding", "left padding", "right padding", "causal")
CHOICES: dict[str, tuple[str, ...]] = {
    "head_dim": ("any", "dim a multiple of n_heads", "dim / n_heads"),
    "masks": MASKS,
    "positions": ("any", "shifted", "consecutive"),
    "cache": ("value", "in place", "engine", "none"),
    "appended": ("any", "one token"),
}
SETS: dict[str, tuple[Any, ...]] = {
    "rope_types": tuple(ROPE_USES),
    "tied": (False, True),
    "float32_angles": ("float64", "float32", "bfloat16", "float16"),
}
LEAST_CONTEXT = 16  # the longest sequences of the examples


@dataclass(frozen=True)
class Limits:
    """What an implementation supports. Each default stands for no limit.

    head_dim         "any". "dim a multiple of n_heads": any, where n_heads divides dim.
                     "dim / n_heads" where the code derives it.
    masks            "any": each query may attend to any keys, later ones too. "no later keys": to
                     any up to its own. "padding" (or "left padding", "right padding"): causal, of
                     rows padded to one length; ``real_tokens(mask)`` says which tokens are real.
                     "causal": the mask is always None.
    positions        "any". "shifted": consecutive from any start, the same in every row.
                     "consecutive": always None.
    cache            "value": ``decode`` leaves the cache that it is given as it was. "in place":
                     it may write to it. "engine": the backend keeps it, and has ``start`` and
                     ``append``. "none": no cache.
    appended         the tokens of a call that continues a sequence: "any" number of them, or "one
                     token", after a prompt of any length.
    equal_rows       whether the rows of ``start`` must be of one length.
    rope_types       the supported ones of "default", "linear" and "llama3".
    tied             the supported values of tie_embeddings.
    context          the number of positions, all below it: config.max_seq_len; at least 16.
    batch            the largest number of rows.
    float32_angles   the dtypes in which a rotary angle is a float32 product of position and
                     frequency; its error grows with the position and is judged by the bound of
                     that product (angle_error.float32_angle_bound).
    float32_epsilon  whether norm_eps is stored in float32: it is drawn among float32's numbers.

    Raises InputError naming a bad field.
    """

    head_dim: str = "any"
    masks: str = "any"
    positions: str = "any"
    cache: str = "value"
    appended: str = "any"
    equal_rows: bool = False
    rope_types: tuple[str, ...] = SETS["rope_types"]
    tied: tuple[bool, ...] = SETS["tied"]
    context: int | None = None
    batch: int | None = None
    float32_angles: tuple[str, ...] = ()
    float32_epsilon: bool = False

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(
                    f"limits: {name} must be one of {', '.join(map(repr, choices))}, "
                    f"got {getattr(self, name)!r}"
                )
        for name, known in SETS.items():
            value = getattr(self, name)
            fits = isinstance(value, tuple) and all(one in known for one in value)
            if not fits or (not value and name != "float32_angles"):
                raise InputError(f"limits: {name} must be a tuple of {known}, got {value!r}")
        for name, least in (("context", LEAST_CONTEXT), ("batch", 1)):
            value = getattr(self, name)
            if value is not None and not (type(value) is int and value >= least):
                raise InputError(
                    f"limits: {name} must be None or an integer of at least {least}, got {value!r}"
                )

    def declared(self) -> dict[str, Any]:
        """Return the fields that are limits, by name."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }

    def checkpoint_flags(self) -> str:
        """Return the flags by which llama_parity.random_checkpoint writes a model inside these."""
        scaled = "" if "default" in self.rope_types else f" --rope-type {self.rope_types[0]}"
        return f"--shape tiny{scaled}{'' if False in self.tied else ' --tied'}"

    def excluding(self, config: LlamaConfig) -> str:
        """Return the name of a limit that a config is outside; "" inside all."""
        derived = config.head_dim * config.n_heads == config.dim
        if (self.head_dim == "dim / n_heads" and not derived) or (
            self.head_dim == "dim a multiple of n_heads" and config.dim % config.n_heads
        ):
            return "head_dim"
        if config.rope_type not in self.rope_types:
            return "rope_types"
        return "" if config.tie_embeddings in self.tied else "tied"

    @property
    def padding_sides(self) -> tuple[bool, ...]:
        """The sides on which rows may be padded, True for the left; none under a causal mask."""
        if self.batch == 1:
            return ()
        either = (False, True)
        sides = {"left padding": (True,), "right padding": (False,), "causal": ()}
        return sides.get(self.masks, either)


UNLIMITED = Limits()


def limits_of(backend: Any) -> Limits:
    """Return the limits that a backend declares; none where it has no attribute ``limits``."""
    declared = getattr(backend, "limits", None)
    return declared if isinstance(declared, Limits) else UNLIMITED


def real_tokens(mask: Array) -> Array:
    """Return which of the keys are tokens, bool [B, S]: False is padding.

    ``mask`` [B, T, S] is one of padded rows ("padding" in Limits). It is the ``attention_mask``
    of other libraries. A single padding token at the end of a row counts as real: no query sees
    it but its own.
    """
    real: Array = mask[:, -1].copy()
    if mask.shape[1] == mask.shape[2]:  # padding on the right sees itself, and so the last query
        real[:, -1] &= ~real[:, 0] | real.all(axis=1)
    return real
