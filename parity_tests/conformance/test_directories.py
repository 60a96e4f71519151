"""What a port makes of a whole model directory, by its own loader or converter.

A backend offers ``from_directory`` (reference_np/backend.py). The suite writes a directory in
Hugging Face's form, the port reads it, and its logits are held to the oracle's on the stored
numbers. Each key of config.json that matters is also changed alone, so that a failure names the
key that was not read.
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference_np.config import LlamaConfig
from reference_np.limits import limits_of
from reference_np.tolerances import errors

from .calls import Calls, ParityError
from .case_parts import best_dtype, oracle_logits, rounded_to
from .config_keys import KEYS, LENGTH, PLAIN_NAME, Key, named
from .description import describe_error
from .directories import ABSENT, Form, forms, write_directory
from .judge import JUDGE
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
        _compare(backend, dtype, (case.config, str(form), folder), case.tokens, exact)


def _compare(
    backend: Any, dtype: str, written: tuple[LlamaConfig, str, str], tokens: Array, exact: Array
) -> None:
    """Compare the logits of a directory (its config, form in words, path) with ``exact``."""
    JUDGE.compare(
        backend,
        dtype,
        lambda model: {"logits": model.directory_logits(*written, dtype, tokens)},
        {"logits": exact},
    )


@pytest.mark.needs("from_directory")
@pytest.mark.parametrize("key", KEYS)
def test_key_of_config_json(backend: Any, key: str) -> None:
    """Logits of a directory in which one key of config.json is unlike the first Llama's."""
    about, dtype, limits = KEYS[key], best_dtype(backend), limits_of(backend)
    if name := limits.excluding(about.config):
        outside = f"{name} = {getattr(limits, name)}"
        JUDGE.entry.by_limit[outside] += 1
        pytest.skip(f"not covered, by limit: {outside}")
    with tempfile.TemporaryDirectory() as folder:
        written = _write(backend, about, folder, dtype)
        try:
            _compare(backend, dtype, written.words, written.tokens, written.exact)
        except ParityError as error:
            why = _unread(backend, dtype, about, written)
            why = why or f"{error.sentence}{_also_plain(backend, dtype, key, error)}"
            sentence = f"config.json: {key}: {why}"
            raise ParityError(sentence, error.details, error.resembling) from None
        except (AssertionError, pytest.fail.Exception):
            raise
        except Exception as error:
            why = describe_error(error)
            why += _also_plain(backend, dtype, key, error)
            raise ParityError(f"config.json: {key}: from_directory failed: {why}") from error


class _Written(NamedTuple):
    """A directory on disk: config, form in words and path; its numbers; tokens and logits."""

    words: tuple[LlamaConfig, str, str]
    stored: Params
    tokens: Array
    exact: Array


def _write(backend: Any, about: Key, folder: str, dtype: str) -> _Written:
    """Write the directory of a key; return it with the oracle's logits of 16 tokens."""
    config = about.config
    if context := limits_of(backend).context:
        config = replace(config, max_seq_len=context)
    params = random_params(config, 0, embed_scale=0.3)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, LENGTH))
    stored = write_directory(Path(folder), config, params, Form(about.version), about.changed)
    stored = rounded_to(dtype, stored)
    words = config, f"config.json as transformers {about.version}", folder
    return _Written(words, stored, tokens, oracle_logits(stored, config, tokens))


def _unread(backend: Any, dtype: str, about: Key, written: _Written) -> str:
    """Return the value of a key with which the oracle has the port's logits; "" for none."""
    found = Calls(backend).directory_logits(*written.words, dtype, written.tokens)
    actual = np.asarray(found, np.float64)
    distances = {}
    for value, config in {**about.lost, **about.unread}.items():
        other = oracle_logits(written.stored, config, written.tokens)
        distances[value] = errors(actual, other).rms
        # Far nearer than any honest difference of the two values.
        if distances[value] > min(1e-3, errors(written.exact, other).rms / 10):
            del distances[value]
    if not distances:
        return ""
    value = min(distances, key=distances.__getitem__)
    is_unread = value in about.unread and about.is_key and ABSENT not in about.changed.values()
    return f"{'is not read: ' if is_unread else ''}the logits are those with {value}"


def _also_plain(backend: Any, dtype: str, key: str, error: Exception) -> str:
    """Return words for a kind of failure that a directory of usual values has too; or ""."""
    plain = named(PLAIN_NAME, KEYS[key].version)
    if key == plain or limits_of(backend).excluding(KEYS[plain].config):
        return ""
    with tempfile.TemporaryDirectory() as folder:
        written = _write(backend, KEYS[plain], folder, dtype)
        try:
            _compare(backend, dtype, written.words, written.tokens, written.exact)
        except Exception as other:  # the port fails on it in whatever way
            if type(other) is not type(error):
                return ""
            return "; a plain directory fails too, so it need not be this key"
    return ""
