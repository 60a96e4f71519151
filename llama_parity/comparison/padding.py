"""Find the padding of a call's rows: its outputs are not judged, since honest code differs there.

Axes: B batch, T tokens of the call, S cached + T.
"""

from collections.abc import Sequence

import numpy as np

from reference_np.limits import real_tokens
from reference_np.ops import Array, causal_mask

from .replay import Activations, Key
from .trace_format import Call, call_chain, n_cached

# Numbers at padding beyond this are replaced before the oracle reads them: a product of two in
# float32 would overflow, and a weight of zero makes NaN of an infinity.
LARGEST = 1e15

Padding = Sequence[Array | None]  # by call: bool [B, T], True is padding; None where none is


def find_padding(calls: Sequence[Call]) -> Padding:
    """Return which tokens of every call are padding, as the masks of its whole sequence tell.

    In a row with padding each real token may attend to exactly the real tokens up to itself, there
    are two of them at least, and they are contiguous in each call: padding lies at the left or the
    right end. Padding of a call is alike: it may attend to nothing; or, being one token id, to
    itself, and on the right to the real tokens before it, with itself or with all padding before
    it. A row with any other mask has none, and all of it is judged.
    """
    found: list[Array] = [np.zeros(call.tokens.shape, dtype=bool) for call in calls]
    for last in set(range(len(calls))) - {call.after for call in calls}:
        chain = call_chain(calls, last)
        if all(calls[c].mask is None for c in chain):
            continue
        padding_BS = _padding_of_sequence(calls, chain)
        for c in chain:
            start = n_cached(calls, c)
            found[c] |= padding_BS[:, start : start + found[c].shape[1]]
    return [padding if padding.any() else None for padding in found]


def _padding_of_sequence(calls: Sequence[Call], chain: Sequence[int]) -> Array:
    """Return which tokens [B, S] of a chain of calls are padding; none in a row of another mask.

    The last query attends to the real tokens; where padding may attend to nothing, not even to
    itself, a real token is one that may.
    """
    mask_BSS = _mask_of_sequence(calls, chain)
    last = calls[chain[-1]].mask
    seen = np.ones(mask_BSS.shape[:2], dtype=bool)
    if last is not None:
        seen &= real_tokens(last)
    seeing = np.diagonal(mask_BSS, axis1=1, axis2=2)
    padding_BS = _padding_if_real(calls, chain, mask_BSS, seen)
    other = _padding_if_real(calls, chain, mask_BSS, seeing)
    return np.where(padding_BS.any(axis=1, keepdims=True), padding_BS, other)


def _padding_if_real(
    calls: Sequence[Call], chain: Sequence[int], mask_BSS: Array, real_BS: Array
) -> Array:
    """Return ``~real_BS`` in the rows whose mask is that of these real tokens, else False."""
    n_keys = mask_BSS.shape[-1]
    causal = causal_mask(n_keys, n_keys)
    visible = causal & real_BS[:, None]
    alike = ((mask_BSS == visible) | ~real_BS[:, :, None]).all(axis=(1, 2))
    is_blind = ~(mask_BSS & ~real_BS[:, :, None]).any(axis=(1, 2))
    tokens_BS = np.concatenate([calls[c].tokens for c in chain], axis=1)
    pad_id = tokens_BS[np.arange(len(tokens_BS)), real_BS.argmin(axis=1)]  # of the first padding
    is_one_id = ((tokens_BS == pad_id[:, None]) | real_BS).all(axis=1)
    # Of one real token the mask does not tell it from tokens that each see themselves alone.
    alike &= np.where(is_blind, real_BS.any(axis=1), is_one_id & (real_BS.sum(axis=1) > 1))
    is_left = np.cumsum(real_BS, axis=1) == 0
    own = np.eye(n_keys, dtype=bool)
    forms = (  # of what padding may attend to
        np.zeros_like(mask_BSS),
        visible,
        visible | own,
        np.where(is_left[:, :, None], own, causal),
    )
    for c in chain:
        start = n_cached(calls, c)
        part = slice(start, start + calls[c].tokens.shape[1])
        real = real_BS[:, part]
        is_form = [
            ((mask_BSS[:, part] == form[:, part]) | real[:, :, None]).all(axis=(1, 2))
            for form in forms
        ]
        alike &= np.any(is_form, axis=0) & ((real[:, 1:] != real[:, :-1]).sum(axis=1) <= 1)
        if not (real | ~alike[:, None]).any():  # nothing of the call would be judged
            alike[:] = False
    padding: Array = ~real_BS & alike[:, None]
    return padding


def _mask_of_sequence(calls: Sequence[Call], chain: Sequence[int]) -> Array:
    """Return the mask [B, S, S] of all tokens of a chain of calls."""
    n_keys = n_cached(calls, chain[-1]) + calls[chain[-1]].tokens.shape[1]
    mask_BSS = np.zeros((len(calls[chain[0]].tokens), n_keys, n_keys), dtype=bool)
    for c in chain:
        start, length = n_cached(calls, c), calls[c].tokens.shape[1]
        end, mask = start + length, calls[c].mask
        mask_BSS[:, start:end, :end] = causal_mask(length, end) if mask is None else mask
    return mask_BSS


def without_padding(activations: Activations, padding: Padding) -> dict[Key, Array]:
    """Return the activations with zeros at padding, where no error is measured then."""
    return {key: _zeroed(value, padding[key[0]]) for key, value in activations.items()}


def readable(activations: Activations, padding: Padding) -> dict[Key, Array]:
    """Return activations in which NaN, infinities and vast numbers at padding are zeros.

    The oracle may read them: all other numbers at padding are as they were, since a port that
    forgets its mask computes with them.
    """
    found = dict(activations)
    for (c, name), value in activations.items():
        where = padding[c]
        if where is None or value.shape[:2] != where.shape:
            continue
        usable = np.abs(value) <= LARGEST  # False of NaN
        if not usable.all():
            at = where.reshape(where.shape + (1,) * (value.ndim - 2))
            found[c, name] = np.where(at & ~usable, 0.0, value)
    return found


def _zeroed(value: Array, padding: Array | None) -> Array:
    """Return a copy with zeros at padding [B, T]; the array itself where that does not fit it."""
    if padding is None or value.shape[:2] != padding.shape:
        return value
    copy = value.copy()
    copy[padding] = 0
    return copy


def padding_note(calls: Sequence[Call], padding: Padding, is_covered: Sequence[bool]) -> str:
    """Return a sentence of the tokens that are not judged of calls that are; "" for none."""
    padded = [
        (call.name, where)
        for call, where, covered in zip(calls, padding, is_covered, strict=True)
        if where is not None and covered
    ]
    if not padded:
        return ""
    listed = [f"{int(w.sum())} of {w.size} tokens of {name}" for name, w in padded]
    more = f" and {len(listed) - 4} more calls" if len(listed) > 4 else ""
    return f"Padding is not judged: {'; '.join(listed[:4])}{more}."
