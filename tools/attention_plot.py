"""Draw how two models attend to an instruction over a dialogue (extra: plot).

``python tools/attention_plot.py PICTURE --before DIR --after DIR --data FILE``: Llama
2's figure 10, before Ghost Attention and after it. The weights are those of the NumPy oracle.
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
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

import tyro

from llama_common import cli
from llama_common.errors import InputError, check_positive
from llama_common.files import require_writable
from llama_torch.checkpoint.weight_files import require_weights
from tools.pictures import pyplot, save

if TYPE_CHECKING:
    from reference_np.ops import Array

ENDINGS = (".svg", ".png", ".pdf")


@dataclass(frozen=True)
class AttentionConfig:
    """Draw the attention that the tokens of a dialogue pay to its instruction, in two models."""

    command: ClassVar[str] = "python tools/attention_plot.py"

    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PICTURE")]
    """File to write: .svg, .png or .pdf."""
    before: str
    """Directory of a model."""
    after: str
    """Directory of the other, of the same tokens: the first after Ghost Attention."""
    data: str
    """File of conversations."""
    number: int = 1
    """Which of them, counted from 1."""
    instruction: str = ""
    """The instruction, a text of the dialogue; empty = its system message."""
    template: str = ""
    """Jinja file, or llama2 for Llama 2's [INST] form; empty = the first model's own template."""
    bin: int = 4
    """Neighbouring tokens that are drawn as one."""

    def __post_init__(self) -> None:
        check_positive(self, "number", "bin")


class Dialogue(NamedTuple):
    """The tokens of a dialogue, and which of them are the instruction's and the answers'."""

    ids: list[int]
    told: list[int]  # places of the instruction's tokens
    answers: list[tuple[int, int]]  # places of each answer's first token, and of the one after it


def read_dialogue(config: AttentionConfig) -> Dialogue:
    """Return the tokens of the conversation; InputError where it or its instruction is missing."""
    from llama_torch.data.conversations import read_conversations
    from llama_torch.tokenizer.answers import answer_segments
    from llama_torch.tokenizer.chat_template import load_jinja
    from llama_torch.tokenizer.loading import load_tokenizer
    from llama_torch.training.conversation_loading import DAY
    from reference_np.checkpoint import Checkpoint

    found = [*read_conversations([config.data], "--data")]
    if config.number > len(found):
        holds = f"--data holds {len(found)} conversations"
        raise InputError(f"--number {config.number}: {holds}; choose one of them")
    messages = found[config.number - 1].messages
    text = config.instruction
    if not text and messages[0]["role"] != "system":
        raise InputError("--instruction is missing: the conversation has no system message")
    folder = Path(config.before)
    tokenizer = load_tokenizer(folder, Checkpoint(folder).config.vocab_size)
    other = load_tokenizer(Path(config.after), Checkpoint(config.after).config.vocab_size)
    if [other.encode(message["content"]) for message in messages] != [
        tokenizer.encode(message["content"]) for message in messages
    ]:
        raise InputError(f"--after {config.after}: has another tokenizer than --before")
    template = load_jinja(folder, tokenizer, config.template, DAY)
    segments = answer_segments(template, messages)
    ids: list[int] = []
    answers = []
    for segment in segments:
        if segment.learnt:
            answers.append((len(ids), len(ids) + len(segment.ids)))
        ids += segment.ids
    told = places_of(tokenizer, ids, text or messages[0]["content"].strip())
    return Dialogue(ids, told, answers)


def places_of(tokenizer: Any, ids: Sequence[int], text: str) -> list[int]:
    """Return the places of the tokens that spell a text where it first occurs in ``ids``."""
    from llama_torch.tokenizer.answers import spelled

    ends = [len(spelled(tokenizer, ids[: n + 1])) for n in range(len(ids))]
    start = spelled(tokenizer, ids).find(text)
    if start < 0:
        told = "the dialogue does not say it; give words of its first message"
        raise InputError(f"--instruction {text!r}: {told}")
    begins = [0, *ends[:-1]]
    spans = enumerate(zip(begins, ends, strict=True))
    return [i for i, (begin, end) in spans if begin < start + len(text) and end > start]


def attention_weights(folder: Path, ids: Sequence[int]) -> "Array":
    """Return the attention weights of every layer and head, float32 [L, H, T, S]."""
    from types import SimpleNamespace

    import numpy as np

    from reference_np import ops
    from reference_np.checkpoint import Checkpoint
    from reference_np.model import forward

    found = []

    def masked_softmax(scores_BNRTS: "Array", mask_BTS: "Array") -> "Array":
        weights_BNRTS = ops.masked_softmax(scores_BNRTS, mask_BTS)
        found.append(weights_BNRTS[0].reshape(-1, *weights_BNRTS.shape[-2:]))
        return weights_BNRTS

    checkpoint = Checkpoint(folder)
    recording = SimpleNamespace(**vars(ops) | {"masked_softmax": masked_softmax})
    forward(checkpoint, np.array([ids]), checkpoint.config, ops=recording)
    return np.stack(found)


def to_instruction(weights_LHTS: "Array", told: Sequence[int]) -> "Array":
    """Return each token's attention to the instruction [T]: the most of any layer and head.

    It is the sum over the instruction's tokens.
    """
    most_T: Array = weights_LHTS[..., told].sum(-1).max((0, 1))
    return most_T


def binned(values: "Array", size: int) -> "Array":
    """Return the mean of every ``size`` neighbours along each axis; the last may be of fewer."""
    import numpy as np

    for axis in range(values.ndim):
        starts = np.arange(0, values.shape[axis], size)
        counts = np.diff([*starts, values.shape[axis]])
        sums = np.add.reduceat(values, starts, axis)
        values = sums / counts.reshape([-1 if i == axis else 1 for i in range(values.ndim)])
    return values


def draw(config: AttentionConfig, dialogue: Dialogue) -> tuple[float, float]:
    """Draw the picture; return the mean attention of later answers to the instruction, of both."""
    plt = pyplot()
    figure = plt.figure(figsize=(9, 6.6), layout="constrained")
    axes = figure.subplot_mosaic([["before", "after"], ["to it", "to it"]], height_ratios=[3, 2])
    later = [t for begin, end in dialogue.answers[1:] for t in range(begin - 1, end - 1)]
    means = []
    for name, colour in (("before", "#888"), ("after", "#c33")):
        weights_LHTS = attention_weights(Path(getattr(config, name)), dialogue.ids)
        image = _draw_map(axes[name], weights_LHTS, dialogue, config.bin)
        axes[name].set_title(f"{name} Ghost Attention")
        to_it_T = to_instruction(weights_LHTS, dialogue.told)
        means.append(float(to_it_T[later].mean()) if later else 0.0)
        places = [config.bin * (i + 0.5) - 0.5 for i in range(-(-len(to_it_T) // config.bin))]
        axes["to it"].plot(places, binned(to_it_T, config.bin), color=colour, label=name)
    figure.colorbar(image, ax=[axes["before"], axes["after"]], label="attention, the most of any")
    _draw_spans(axes["to it"], dialogue)
    save(figure, Path(config.out), dpi=110)
    plt.close(figure)
    return means[0], means[1]


def _draw_spans(axes: Any, dialogue: Dialogue) -> None:
    """Mark the instruction and the answers, and write what is what."""
    told = dialogue.told[0], dialogue.told[-1] + 1
    answers = [(*span, "#7ad", "an answer") for span in dialogue.answers]
    named: set[str] = set()
    for begin, end, colour, name in [(*told, "#fc6", "the instruction"), *answers]:
        label = None if name in named else name
        axes.axvspan(begin - 0.5, end - 0.5, color=colour, alpha=0.35, lw=0, label=label)
        named.add(name)
    axes.set(xlabel="token", ylabel="attention to the instruction", ylim=(0, 1))
    axes.margins(x=0)
    axes.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))


def _draw_map(axes: Any, weights_LHTS: "Array", dialogue: Dialogue, size: int) -> Any:
    """Draw the most attention of any layer and head, tokens in bins, the instruction marked."""
    n = len(dialogue.ids)
    values = binned(weights_LHTS.max((0, 1)), size)
    edge = values.shape[0] * size - 0.5
    image = axes.imshow(
        values, cmap="viridis", vmin=0, vmax=1, extent=(-0.5, edge, edge, -0.5), aspect="auto"
    )
    axes.set(xlabel="attended to", ylabel="token", xlim=(-0.5, n - 0.5), ylim=(n - 0.5, -0.5))
    for place in (dialogue.told[0] - 0.5, dialogue.told[-1] + 0.5):
        axes.axvline(place, color="#fc6", lw=1)
    return image


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return cli.run(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
    config = cli.parse(AttentionConfig, argv)
    if Path(config.out).suffix not in ENDINGS:
        raise InputError(f"{config.out}: the picture's name must end in {', '.join(ENDINGS)}")
    require_writable(Path(config.out).resolve(), config.out)
    for folder in (config.before, config.after):
        require_weights(Path(folder))
    before, after = draw(config, read_dialogue(config))
    print(
        f"attention of later answers to the instruction, the most of any layer and head: "
        f"{before:.3f} before, {after:.3f} after"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
