"""A trainer under torchrun whose second process gets a signal: ``... SIGNAL STEP FLAGS``.

The signal comes before step STEP, and only in the first attempt.
"""

import itertools
import os
import sys
from typing import Any
from unittest.mock import patch

import torch

from llama_torch import train
from llama_torch.common import torchrun
from llama_torch.training import loop
from llama_torch.training.step import train_step


def main() -> int:
    torch.set_num_threads(1)
    signal_number, signalled_step = int(sys.argv[1]), int(sys.argv[2])
    n_steps = itertools.count(1)

    def step(*args: Any, **kwargs: Any) -> Any:
        if (
            next(n_steps) == signalled_step
            and os.environ["RANK"] == "1"
            and not torchrun.is_restarted()
        ):
            os.kill(os.getpid(), signal_number)
        return train_step(*args, **kwargs)

    with patch.object(loop, "train_step", step):
        return train.main(sys.argv[3:])


if __name__ == "__main__":
    torchrun.exit_process(main)
