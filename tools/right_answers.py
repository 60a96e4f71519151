"""Measure the share of right answers: ``python tools/right_answers.py CKPT PROMPTS.jsonl``.

The prompts are those of ``python tools/tasks.py``, whose right answers are known; the checkpoint
answers them greedily.
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

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import tyro

from llama_common import cli
from llama_common.errors import InputError, check_between
from llama_torch.checkpoint.weight_files import require_weights
from tools.synthetic.grading import Share, read_prompts, shares

MOST_TOKENS = 4096


@dataclass(frozen=True)
class AnswersConfig:
    """Let a checkpoint answer prompts, and print the share of right answers by kind and turn."""

    command: ClassVar[str] = "python tools/right_answers.py"

    ckpt: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CKPT")]
    """Model directory or training run directory."""
    prompts: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPTS")]
    """A file of prompts, written by tools/tasks.py."""
    template: str = ""
    """Jinja file, or "llama2" for Llama 2's form; empty = the checkpoint's own template."""
    limit: int = 0
    """The first so many prompts; 0 = all."""
    max_new_tokens: int = 24
    """Tokens of an answer, at most."""
    batch_size: int = 32
    """Prompts answered at once."""
    reward: str = ""
    """Directory of a reward model, whose mean score of the answers is told too."""
    json: bool = False
    """Print the shares as JSON, instead of the table."""

    def __post_init__(self) -> None:
        check_between(
            self,
            ("limit", 0, 2**31),
            ("max_new_tokens", 1, MOST_TOKENS),
            ("batch_size", 1, 4096),
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return cli.run(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
    config = cli.parse(AnswersConfig, argv)
    records = read_prompts(Path(config.prompts))[: config.limit or None]
    if not records:
        raise InputError(f"{config.prompts}: holds no prompt")
    require_weights(Path(config.ckpt))
    # These import torch, which takes seconds: what is wrong is told before.
    from llama_torch import SamplingConfig, load

    model = load(config.ckpt, template=config.template)
    settings = SamplingConfig(max_new_tokens=config.max_new_tokens, temperature=0)
    conversations = [record["messages"] for record in records]
    answers = model.chat_batch(conversations, settings, max_rows=config.batch_size)
    said = [answer.text for answer in answers]
    rewards = _rewards(config, model, conversations, said) if config.reward else None
    found = shares(records, said, rewards)
    if config.json:
        print(json.dumps([share._asdict() for share in found], indent=1))
    else:
        _show(found)
    return 0


def _rewards(
    config: AnswersConfig, model: Any, conversations: Sequence[list[Any]], said: Sequence[str]
) -> list[float]:
    """Return a reward model's scores of the answers to conversations."""
    from llama_torch.rlhf.scoring import assistant, load_scorer
    from llama_torch.tokenizer.chat_template import load_jinja

    template = load_jinja(Path(config.ckpt), model.tokenizer, config.template)
    scorer = load_scorer(config.reward, template, device=model.model.head_weight.device)
    answered = zip(conversations, said, strict=True)
    rows = [
        scorer.template.encode([*messages, assistant(text)], prompts=False)
        for messages, text in answered
    ]
    longest, context = max(map(len, rows)), scorer.model.config.max_seq_len
    if longest > context:
        raise InputError(
            f"--reward {config.reward}: its context holds {context:,} tokens, and the longest "
            f"conversation has {longest:,}; give a reward model with a longer one"
        )
    scores: list[float] = scorer.score(rows).tolist()
    return scores


def _show(found: Sequence[Share]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column("questions")
    has_rewards = any(share.reward is not None for share in found)
    headings = "number", "right", "in another form", "standard error"
    for heading in (*headings, *(("reward",) if has_rewards else ())):
        table.add_column(heading, justify="right")
    for share in found:
        table.add_row(
            *(share.questions, str(share.number), f"{share.right:.1%}"),
            *(f"{share.other_form:.1%}", f"{share.error:.1%}"),
            *(() if share.reward is None else (f"{share.reward:.3f}",)),
        )
    Console(highlight=False).print(table)


if __name__ == "__main__":
    sys.exit(main())
