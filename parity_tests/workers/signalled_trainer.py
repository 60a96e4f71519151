"""A trainer under torchrun whose second process is signalled: ``... SIGNAL STEP FLAGS``.

Before STEP, in the first attempt alone.
"""

import os
import sys
from typing import Any
from unittest.mock import patch

import torch

from llama_torch import train
from llama_torch.common import torchrun
from llama_torch.distributed import job
from llama_torch.training import loop
from llama_torch.training.step import train_step


def main() -> int:
    torch.set_num_threads(1)
    signal_number, at, real, taken = int(sys.argv[1]), int(sys.argv[2]), train_step, [0]

    def step(*args: Any, **kwargs: Any) -> Any:
        taken[0] += 1
        if taken[0] == at and os.environ["RANK"] == "1" and not torchrun.is_restarted():
            os.kill(os.getpid(), signal_number)
        return real(*args, **kwargs)

    with patch.object(loop, "train_step", step):
        return train.main(sys.argv[3:])


if __name__ == "__main__":
    job.exit_process(main)
