"""Rejection sampling: ``python -m llama_torch.rejection --model DIR --reward DIR --prompts FILE``.

Of several answers to each prompt it keeps the one that a reward model scores best; then
``python -m llama_torch.sft`` learns these.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from llama_common import cli
from llama_common.errors import InputError
from llama_common.files import require_writable_below

from .checkpoint.weight_files import require_weights
from .data.text_files import find_files, named_by
from .finetuning_config import require_template
from .rlhf.rejection_config import RejectionConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return cli.run(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
    config = cli.parse(RejectionConfig, argv)
    with named_by("--prompts"):
        find_files(config.prompts)
    for flag in ("model", "reward", "safety_reward"):
        if getattr(config, flag):
            require_weights(Path(getattr(config, flag)))
    if Path(config.out).exists() and not config.resume:
        raise InputError(f"--out {config.out}: is there already; name a new folder, or --resume it")
    require_writable_below(Path(config.out))
    require_template(config.template)
    from .rlhf.rejection import run  # imports torch: what is wrong is told before

    print("\n".join(run(config)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
