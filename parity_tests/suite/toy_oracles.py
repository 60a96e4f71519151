"""The oracle as a port, with a bug that few models show."""

from typing import Any

import numpy as np

from ..conformance.oracle import Oracle


class QueriesTransposedWhereSquare(Oracle):
    """The oracle with q_proj transposed in every model whose q_proj is square."""

    def decode(self, config: Any, params: Any, *rest: Any) -> Any:
        read = {
            name: value.T if "q_proj" in name and len(set(value.shape)) == 1 else value
            for name, value in params.items()
        }
        return super().decode(config, read, *rest)


class WrongInTheAdaptersCheckAlone(Oracle):
    """The oracle without the final norm in a model that no check draws."""

    def decode(self, config: Any, params: Any, *rest: Any) -> Any:
        drawn = not config.dim == config.hidden_dim == config.vocab_size == 16
        read = params if drawn else dict(params) | {"model.norm.weight": np.ones(config.dim)}
        return super().decode(config, read, *rest)
