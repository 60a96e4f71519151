"""Porting bugs planted in torch: ``parity_tests.planted:bug.NAME`` is a backend with one."""

from .port import bug

__all__ = ["bug"]
