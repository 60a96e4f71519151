"""Build dialogues that teach an instruction to last: ``python -m llama_torch.gatt``.

Ghost Attention (Llama 2, section 3.3). ``python -m llama_torch.sft`` learns from what it writes.
"""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from llama_common import cli
from llama_common.errors import InputError, check, check_positive, check_text, printable, quoted
from llama_common.files import new_folder, require_writable_below, write_json

from .checkpoint.weight_files import require_weights
from .finetuning_config import require_template
from .inference.config import Dtype, LoadConfig, Quantize, SamplingConfig
from .rlhf.dialogues import Dialogue, Draft, Place

if TYPE_CHECKING:
    from .rlhf.ghost_attention import Sampler

DATA_FILE = "conversations.jsonl"
SETTINGS_FILE = "gatt.json"
MOST_REASONS = 4  # for which dialogues were dropped, told apart


@dataclass(frozen=True)
class GattConfig:
    """Build dialogues of a model's own that teach an instruction to last (Ghost Attention)."""

    command: ClassVar[str] = "python -m llama_torch.gatt"
    basic: ClassVar[str] = (
        "model prompts instructions out place turns max_new_tokens temperature seed"
    )

    model: str
    """Directory of the model whose answers are drawn."""
    prompts: tuple[str, ...]
    """Files of conversations or prompts (.jsonl, also .gz or .zst; .parquet), folders or globs: the
    user's messages are asked, and all else is passed over."""
    instructions: str
    """Text file, one a line; or .jsonl of {"instruction": ..., "short": ...}: the terser form, if
    there is one, is learnt in half of the dialogues."""
    out: str
    """New folder for conversations.jsonl, which llama_torch.sft reads, and gatt.json."""
    place: Place = "system"
    """Where the instruction stands in what is learnt: the system message, or the first user one."""
    turns: int = 0
    """User messages of a dialogue: longer conversations are cut, shorter ones joined; 0 = as they
    are."""
    combine: int = 1
    """Instructions of a dialogue, at most: 1 to so many are drawn and joined."""
    limit: int = 0
    """Dialogues at most, the first; 0 = all."""
    template: str = ""
    """Jinja file, or llama2 for Llama 2's [INST] form; empty = the model's own template."""
    max_new_tokens: int = 256
    """Tokens of an answer; a dialogue with an answer that does not end within them is dropped."""
    temperature: float = 0.8
    """Divisor of the logits; 0 = greedy."""
    top_p: float = 1.0
    """Sample from the fewest most probable tokens whose probabilities sum to this; 1 = all."""
    seed: int = 0
    """Seed of all that is drawn."""
    rows: int = 32
    """Answers drawn at a time: more take more memory, and are quicker on a GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the model; auto = a GPU if there is one."""
    dtype: Dtype = "float32"
    """Precision of the weights in memory."""
    quantize: Quantize = "none"
    """Precision of the matrices: int8 = half of bfloat16's memory; int4 = a quarter."""

    def __post_init__(self) -> None:
        for name in ("model", "instructions", "out"):
            check_text(name, getattr(self, name))
        check(bool(self.prompts), "prompts", self.prompts, "must not be empty")
        check_positive(self, "combine", "rows")
        for name in ("turns", "combine", "limit", "rows"):
            value = getattr(self, name)
            check(0 <= value < 2**31, name, value, "must lie between 0 and 2^31 - 1")
        _ = self.sampling, self.load  # which check their own

    @property
    def sampling(self) -> SamplingConfig:
        """The settings of each answer, but for its seed."""
        return SamplingConfig(
            self.max_new_tokens, self.temperature, top_p=self.top_p, seed=self.seed
        )

    @property
    def load(self) -> LoadConfig:
        """The settings of loading the model."""
        return LoadConfig(self.model, self.device, self.dtype, self.quantize)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return cli.run(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
    config = cli.parse(GattConfig, argv)
    if Path(config.out).exists():
        raise InputError(f"--out {config.out}: is there already; name a new folder")
    require_writable_below(Path(config.out))
    require_template(config.template)
    require_weights(Path(config.model))
    given = read_drafts(config)
    from .inference.text_model import load_from  # imports torch: what is wrong is told before
    from .rlhf.answers import require_ends
    from .rlhf.ghost_attention import Sampler

    model = load_from(config.load, config.template)
    require_ends(model.end_ids, f"--model {config.model}")
    sampler = Sampler(model, config.sampling, config.place)
    try:
        with new_folder(Path(config.out)) as folder:
            lengths = write(folder, sampler, given, config)
    except OSError as error:
        raise InputError(
            f"--out {config.out} cannot be written ({error}); choose another"
        ) from None
    print("\n".join(_summary(config, lengths, sampler.dropped)))
    return 0


def read_drafts(config: GattConfig) -> list[Draft]:
    """Return the dialogues whose answers are to be drawn; InputError where there is none."""
    from .rlhf.ghost_attention import drafts, of_length, read_questions  # imports NumPy
    from .rlhf.instructions import read_instructions

    questions = of_length(read_questions(config.prompts), config.turns)
    if not questions:
        raise InputError(
            f"--turns {config.turns}: --prompts holds fewer messages of the user's; ask for fewer"
        )
    instructions = read_instructions(config.instructions)
    questions = questions[: config.limit or None]
    return drafts(questions, instructions, config.combine, config.seed)


def write(
    folder: Path, sampler: "Sampler", given: Sequence[Draft], config: GattConfig
) -> Counter[int]:
    """Write a folder's files; return the number of dialogues by their turns.

    Raises InputError where every dialogue was dropped.
    """
    from .rlhf.ghost_attention import taught

    dialogues: list[Dialogue] = []
    for turn, dialogues in enumerate(sampler.sample(given, config.rows), 1):
        print(f"turn {turn}: {len(dialogues):,} of {len(given):,} dialogues are left", flush=True)
    if not dialogues:
        [(reason, n)] = sampler.dropped.most_common(1)
        raise InputError(f"all dialogues are dropped, {n:,} since {reason}; nothing is written")
    with (folder / DATA_FILE).open("w", encoding="utf-8") as file:
        for dialogue in dialogues:
            file.write(json.dumps(taught(dialogue, config.place)) + "\n")
    lengths = Counter(len(dialogue.answers) for dialogue in dialogues)
    counts = {"dialogues": lengths.total(), "dropped": dict(sampler.dropped)}
    write_json(folder / SETTINGS_FILE, {"settings": asdict(config), **counts})
    return lengths


def _summary(config: GattConfig, lengths: Counter[int], dropped: Counter[str]) -> list[str]:
    """Return lines on what was written, what was dropped, and the command that learns from it."""
    path = printable(str(Path(config.out) / DATA_FILE))
    told = ", ".join(f"{n:,} of {turns}" for turns, n in sorted(lengths.items())[:MOST_REASONS])
    more = ", ..." if len(lengths) > MOST_REASONS else ""
    lines = [f"{path}: {lengths.total():,} dialogues, by their turns {told}{more}"]
    lines += [f"dropped: {n:,}, since {why}" for why, n in dropped.most_common(MOST_REASONS)]
    template = f" --template {quoted(config.template)}" if config.template else ""
    learn = f"--init-from {quoted(config.model)}{template} --data {quoted(path)}"
    return [*lines, f"next:\n  python -m llama_torch.sft {learn}"]


if __name__ == "__main__":
    sys.exit(main())
