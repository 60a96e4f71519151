"""Measure how many pairs a reward model ranks right: ``python tools/rank_pairs.py CKPT PAIRS``.

The pairs are in any form that ``python -m llama_torch.reward`` reads.
"""

import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    # Ctrl-C while modules are imported: see llama_common/interrupt.py. cli.run takes over.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # The tools are not installed. Run as a script, their folder is on the path, where its parent
    # should be.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import tyro

from llama_common import cli
from llama_common.errors import InputError, check_positive
from llama_torch.checkpoint.weight_files import require_weights


@dataclass(frozen=True)
class RankConfig:
    """Score pairs of answers with a reward model; print the accuracy by strength and safety tag."""

    command: ClassVar[str] = "python tools/rank_pairs.py"

    ckpt: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CKPT")]
    """Directory of a reward model."""
    pairs: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PAIRS")]
    """File, folder or glob of pairs."""
    template: str = ""
    """Jinja file, or "llama2" for Llama 2's form; empty = the checkpoint's own template."""
    batch_size: int = 16
    """Pairs in one forward pass."""

    def __post_init__(self) -> None:
        check_positive(self, "batch_size")


def rank(config: RankConfig) -> list[str]:
    """Return the lines of the table, and one on loss and mean gap."""
    # These import torch: a wrong flag is told before.
    from llama_torch.checkpoint.hf import load_reward_model
    from llama_torch.common.reading import told
    from llama_torch.data.preferences import read_pairs
    from llama_torch.tokenizer.chat_template import load_jinja
    from llama_torch.tokenizer.loading import load_tokenizer
    from llama_torch.training.conversation_loading import DAY
    from llama_torch.training.objective import shown
    from llama_torch.training.pair_loading import tokenise
    from llama_torch.training.pair_objective import PairLoss
    from llama_torch.training.pair_source import pair_batch, pair_batches
    from llama_torch.training.validate import measure

    folder = Path(config.ckpt)
    require_weights(folder)
    model = load_reward_model(folder)
    template = load_jinja(
        folder, load_tokenizer(folder, model.config.vocab_size), config.template, DAY
    )
    given = [*told(read_pairs([config.pairs], "PAIRS"), "pairs read")]
    if not given:
        raise InputError(f"PAIRS {config.pairs}: holds no pair; name a file that does")
    pairs = tokenise(given, template, model.config.max_seq_len)
    left_out = len(given) - len(pairs.places)
    batches = pair_batches(pairs, config.batch_size)
    found = measure(model, batches, pair_batch, objective=PairLoss())
    note = f"; {left_out:,} pairs are longer than the context, and left out" if left_out else ""
    return [*found.table, f"loss without a margin {found.loss:.3f}{shown(found.values)}{note}"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return cli.run(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
    print("\n".join(rank(cli.parse(RankConfig, argv))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
