"""What a port makes of a whole model directory, by its own loader or converter.

A backend offers ``from_directory`` (reference_np/backend.py). The suite writes a directory in
Hugging Face's form, the port reads it, and its logits are held to the oracle's on the stored
numbers. Each key of config.json that matters is also changed alone, so that a failure names the
key that was not read.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference_np.config import LlamaConfig
from reference_np.limits import Limits, limits_of
from reference_np.tolerances import FLOAT64_TOLERANCE, errors

from .bounds import Bounds
from .calls import Calls, ParityError, last_call
from .case_parts import best_dtype, oracle_logits, rounded_to
from .config_keys import (
    ALSO_PLAIN,
    KEYS,
    LENGTH,
    PLAIN_NAME,
    RIGHT_ALONE,
    UNSUPPORTED,
    Key,
    named,
    unrelated,
)
from .description import describe_error
from .directories import ABSENT, Form, end_token, forms, write_directory
from .judge import JUDGE, Judge
from .strategies import Array, Params, random_params, unmasked_cases_for

pytestmark = pytest.mark.numeric


@pytest.mark.needs("from_directory")
@given(data=st.data())
def test_directory(backend: Any, data: st.DataObject) -> None:
    """Logits of a directory in any form, dtype and number of files, of any architecture."""
    dtype = best_dtype(backend)
    case = data.draw(unmasked_cases_for(dtype, limits_of(backend)))
    form = data.draw(forms(case.config))
    with tempfile.TemporaryDirectory() as folder:
        stored = write_directory(Path(folder), case.config, case.params, form)
        exact = oracle_logits(rounded_to(dtype, stored), case.config, case.tokens)
        words = case.config, str(form), folder
        _compare(backend, dtype, _Written(words, stored, case.tokens, exact))


class _Written(NamedTuple):
    """A directory on disk: config, form in words and path; its numbers; tokens and logits."""

    words: tuple[LlamaConfig, str, str]
    stored: Params
    tokens: Array
    exact: Array


def _compare(backend: Any, dtype: str, written: _Written, judge: Judge = JUDGE) -> None:
    """Compare the logits of a directory with the oracle's."""
    judge.compare(
        backend,
        dtype,
        lambda model: {"logits": model.directory_logits(*written.words, dtype, written.tokens)},
        {"logits": written.exact},
    )


@pytest.mark.needs("from_directory")
@pytest.mark.parametrize("key", KEYS)
def test_key_of_config_json(backend: Any, key: str) -> None:
    """Logits of a directory in which one key of config.json is unlike the first Llama's."""
    about, dtype, limits = KEYS[key], best_dtype(backend), limits_of(backend)
    if dtype == "float16" and about.up_scale > 1:
        pytest.skip("not covered: float16 holds no such numbers")
    too_long = about.length > LENGTH and (limits.context or about.length) < about.length
    _skip_outside(limits, "context" if too_long else limits.excluding(about.config))
    name, changed = f"{about.file}: {key}", about.changed.values()
    with tempfile.TemporaryDirectory() as folder:
        written = _write(backend, about, folder, dtype)
        try:
            _compare(backend, dtype, written)
        except ParityError as error:
            actual = _logits(backend, dtype, written)
            if value := _value(actual, {**about.lost, **about.unread}, written, dtype):
                is_unread = value in about.unread and about.is_key and ABSENT not in changed
                why = f"{'is not read: ' if is_unread else ''}the logits are those with {value}"
            elif value := _value(actual, unrelated(about), written, dtype):
                raise _of_every_key(f"{name}{RIGHT_ALONE}{value}") from None
            elif _fails_plain(backend, dtype, key, error):
                raise _of_every_key(f"{name}: {error.sentence}{ALSO_PLAIN}") from None
            else:
                why = _from_some_token_on(written, actual) or error.sentence
            raise ParityError(f"{name}: {why}", error.details, error.resembling) from None
        except Exception as error:  # a loader's own assertion too
            failed = f"{name}: from_directory failed: {describe_error(error)}"
            if _fails_plain(backend, dtype, key, error):
                raise _of_every_key(f"{failed}{ALSO_PLAIN}") from None
            raise ParityError(failed) from error


def _skip_outside(limits: Limits, name: str) -> None:
    """Skip the test where it is outside the limit of a name; "" is inside all."""
    if name:
        outside = f"{name} = {getattr(limits, name)}"
        JUDGE.entry.by_limit[outside] += 1
        pytest.skip(f"not covered, by limit: {outside}")


@pytest.mark.needs("from_directory")
@pytest.mark.parametrize("key", UNSUPPORTED)
def test_unsupported_key(backend: Any, key: str) -> None:
    """A directory that is no plain Llama is refused, by any error, or not computed as one."""
    about, dtype, limits = UNSUPPORTED[key], best_dtype(backend), limits_of(backend)
    plain = Key(about.version, about.config, {})
    is_short = about.config.max_seq_len < LENGTH and limits.context
    _skip_outside(limits, "context" if is_short else limits.excluding(about.config))
    JUDGE.entry.dtype = dtype
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as beside:
        changed = plain._replace(changed=about.changed, more=about.more)
        written = _write(backend, changed, folder, dtype)
        JUDGE.entry.covered += 1
        try:
            found = Calls(backend).directory_logits(*written.words, dtype, written.tokens)
        except ParityError:  # a result that is no logits
            raise
        except Exception:  # a loader's own assertion too
            return
        unchanged = _write(backend, plain, beside, dtype)
        if _is_within(backend, dtype, found, unchanged) or _is_own(
            backend, dtype, found, unchanged
        ):
            raise ParityError(
                f"config.json: {key}: is not read: the logits are those without it; raise an "
                "error for a directory that you do not support"
            )


def _is_own(backend: Any, dtype: str, found: Array, written: _Written) -> bool:
    """Return whether logits are those that the backend has for a directory, right or not.

    So a fault of every directory does not hide a key that is not read.
    """
    own = _logits(backend, dtype, written)
    return own is not None and errors(found.astype(np.float64), own).rms < 1e-9


def _is_within(backend: Any, dtype: str, found: Array, written: _Written) -> bool:
    """Return whether logits are a directory's, within their tolerance."""
    bounds = Bounds(
        dtype,
        lambda model: {"logits": model.directory_logits(*written.words, dtype, written.tokens)},
        FLOAT64_TOLERANCE,
        rms_only=False,
        float32_angles=dtype in limits_of(backend).float32_angles,
    )
    return all(one.share <= 1 for one in bounds.shares("logits", found, written.exact))


def _of_every_key(sentence: str) -> ParityError:
    """Return the failure of a key that others share, in one line; the plain one's is whole."""
    last_call.clear()
    return ParityError(sentence)


def _write(backend: Any, about: Key, folder: str, dtype: str) -> _Written:
    """Write the directory of a key; return it with tokens and the oracle's logits of them."""
    config, length = about.config, about.length
    if context := limits_of(backend).context:
        config, length = replace(config, max_seq_len=context), min(length, context)
    params = random_params(config, 0, embed_scale=0.3)
    scales = {"up_proj": about.up_scale, "down_proj": 1 / about.up_scale}
    for name in params:
        params[name] *= scales.get(name.split(".")[-2], 1.0)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, length))
    tokens[0, length // 3] = end_token(config.vocab_size)
    form = Form(about.version, about.stored)
    stored = write_directory(Path(folder), config, params, form, about.changed, about.more)
    stored = rounded_to(dtype, stored)
    words = config, f"config.json as transformers {about.version}", folder
    return _Written(words, stored, tokens, oracle_logits(stored, config, tokens))


def _logits(backend: Any, dtype: str, written: _Written) -> Array | None:
    """Return the port's logits of a directory in float64; None where they cannot be compared."""
    try:
        found = Calls(backend).directory_logits(*written.words, dtype, written.tokens)
    except Exception:  # a ParityError, or what the port raises
        return None
    return found.astype(np.float64)


def _from_some_token_on(written: _Written, actual: Array | None) -> str:
    """Return words for logits that are right up to a token beyond the usual number; or ""."""
    if actual is None:
        return ""
    errors_T = np.abs(actual - written.exact).max(axis=(0, 2)) / np.abs(written.exact).max()
    first = int(np.argmax(errors_T > max(1e-9, 10 * errors_T[:LENGTH].max())))
    return f"the logits are wrong from token {first:,} on" if first > LENGTH else ""


def _value(
    actual: Array | None, configs: Mapping[str, LlamaConfig], written: _Written, dtype: str
) -> str:
    """Return which of several configs, by name, has the port's logits on the oracle; "" if none."""
    distances = {}
    most = 1e-3 if dtype in ("float64", "float32") else 1.0  # 16 bits err by more
    for value, config in configs.items() if actual is not None else ():
        other = oracle_logits(written.stored, config, written.tokens)
        distance = errors(actual, other).rms
        # Far nearer than any honest difference of the two values.
        if distance <= min(most, errors(written.exact, other).rms / 10):
            distances[value] = distance
    return min(distances, key=distances.__getitem__, default="")


# (backend, version of transformers) -> what it raises on a directory of usual values, or None.
_plain: dict[tuple[str, str], type[Exception] | None] = {}


def _fails_plain(backend: Any, dtype: str, key: str, error: Exception) -> bool:
    """Return whether a directory of usual values fails as the key's does."""
    version = KEYS[key].version
    plain = named(PLAIN_NAME, version)
    if key == plain or limits_of(backend).excluding(KEYS[plain].config):
        return False
    place = JUDGE.current[1], version
    if place not in _plain:
        _plain[place] = _raised_on(backend, KEYS[plain], dtype)
    return _plain[place] is type(error)


def _raised_on(backend: Any, about: Key, dtype: str) -> type[Exception] | None:
    """Return the type of error on the directory of a key, without a record of it."""
    of_this = list(last_call)
    with tempfile.TemporaryDirectory() as folder:
        written = _write(backend, about, folder, dtype)
        try:
            _compare(backend, dtype, written, Judge())
        except Exception as error:  # the port fails on it in whatever way
            return type(error)
        finally:
            last_call[:] = of_this
    return None
