"""The specification's errors of input, for a command to print."""

import contextlib
from collections.abc import Iterator

from llama_common.errors import InputError


@contextlib.contextmanager
def as_input_errors() -> Iterator[None]:
    """Turn the specification's InputError into the one that ``cli.run`` prints as one line."""
    from reference_np import config

    try:
        yield
    except config.InputError as error:
        # Of a backend: here it is no flag's.
        raise InputError(str(error).removeprefix("--backend ")) from error
