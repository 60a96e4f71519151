"""A Llama in torch with known porting bugs: ``parity_tests.planted:bug.NAME`` is a backend."""

from .port import bug

__all__ = ["bug"]
