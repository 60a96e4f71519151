"""Build torch modules whose weights are not drawn."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch import nn


@contextmanager
def without_weights() -> Iterator[None]:
    """Make modules on the meta device, where drawing no weights takes as long as half a model."""
    with ExitStack() as stack:
        stack.enter_context(torch.device("meta"))
        for kind in (nn.Linear, nn.Embedding):
            stack.enter_context(patch.object(kind, "reset_parameters", lambda module: None))
        yield
