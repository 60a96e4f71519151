"""Tell a backend's own refusal from a NotImplementedError of a library beneath it."""

import inspect
from pathlib import Path
from typing import Any

from . import backend as protocol

# Folders of what is shipped for backends: an error raised there speaks for the backend.
ROOT = Path(__file__).resolve().parent.parent
SHIPPED = frozenset({ROOT / "parity_tests" / "backends", ROOT / "llama_parity" / "comparison"})


def is_own_refusal(backend: Any, error: NotImplementedError) -> bool:
    """Return whether a NotImplementedError was raised in the backend's own files.

    They are those of its class and of the classes that it derives from, or of its module.
    """
    raised_in = error.__traceback__
    while raised_in is not None and raised_in.tb_next is not None:
        raised_in = raised_in.tb_next
    if raised_in is None:
        return True
    own = {protocol.__name__, *(cls.__module__ for cls in _classes(backend))}
    if inspect.ismodule(backend):
        own.add(backend.__name__)
    frame = raised_in.tb_frame
    return frame.f_globals.get("__name__") in own or not SHIPPED.isdisjoint(
        Path(frame.f_code.co_filename).parents
    )


def _classes(backend: Any) -> tuple[type, ...]:
    return type(backend).__mro__[:-1]
