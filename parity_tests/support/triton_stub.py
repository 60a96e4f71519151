"""A substitute of triton where it is not installed: kernels can be imported, not run."""

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODULES = ("triton", "triton.language", "triton.language.extra", "triton.language.extra.cuda")


class Stub(ModuleType):
    """A package in which every name is a function that returns its first argument."""

    __path__: list[str] = []  # noqa: RUF012  # what makes it a package

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda first=None, *_, **__: first


def install() -> None:
    """Make ``import triton`` find the stub where triton is not installed."""
    try:
        import triton  # noqa: F401
    except ModuleNotFoundError:
        for name in MODULES:
            package, _, inner = name.rpartition(".")
            sys.modules[name] = Stub(name)
            sys.modules[name].__spec__ = ModuleSpec(name, None)  # find_spec reads it
            if package:
                setattr(sys.modules[package], inner, sys.modules[name])
