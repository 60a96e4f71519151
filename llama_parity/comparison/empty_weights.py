"""Build torch modules without initialising their weights."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch import nn


@contextmanager
def without_weights() -> Iterator[None]:
    """Build modules on the meta device, without the cost of their initialisation.

    On the meta device it draws nothing, and still takes as long as half a model.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.device("meta"))
        for kind in (nn.Linear, nn.Embedding):
            stack.enter_context(patch.object(kind, "reset_parameters", lambda module: None))
        yield
