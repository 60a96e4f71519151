"""Compare an implementation's activations with the NumPy oracle's, and name the bug if any.

``python tools/compare.py ckpt.safetensors``; exit code 0: within bounds, 1: not, or not all of a
trace could be judged, 2: bad input.

The other side is run first and its activations are recorded. Then the oracle runs the same calls,
layer by layer, in float64, which counts as exact, and in the dtype under test. The error of the
latter is the baseline: the other side's may be BASELINE_FACTOR times as large.
"""

import importlib.util
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_common import cli
from llama_common.errors import InputError
from llama_common.files import require_writable, write_text
from reference_np.naming import SCORE
from reference_np.weight_files import Header, require_weights, weight_files

from .comparison.config import LENGTH, CompareConfig
from .conversion.file_kinds import is_gguf
from .running import run

if TYPE_CHECKING:
    from reference_np.config import LlamaConfig
    from reference_np.ops import Array

    from .comparison.run import TrainingInput
    from .comparison.sides import Side
    from .comparison.trace_format import Call


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return run(_main, argv)


def _main(argv: Sequence[str]) -> int:
    settings = cli.parse(CompareConfig, argv)
    path = Path(settings.ckpt)
    _check_outputs(settings, _require_gguf(path) if is_gguf(path) else require_weights(path))
    return _compare(settings)


def _require_gguf(path: Path) -> list[Path]:
    """Return the path of a GGUF file in a list; InputError unless its header can be read."""
    from .conversion.gguf_file import GgufFile

    return [GgufFile(path).path]


def _compare(settings: CompareConfig) -> int:
    # These import NumPy and torch, which takes seconds: a wrong flag is told before.
    import numpy as np

    from .comparison import training_task
    from .comparison.against import find_side
    from .comparison.progress import progress
    from .comparison.run import TrainingInput, check_trains, layer_range, run_comparison
    from .comparison.source import open_checkpoint
    from .comparison.within_limits import config_within

    if settings.reward:
        return _compare_reward(settings)
    _require_language_model(Path(settings.ckpt))
    checkpoint = open_checkpoint(settings.ckpt, np.float64)
    side = find_side(settings.against, settings.dtype, checkpoint)
    layers = layer_range(settings.layers, checkpoint.config.n_layers)
    if settings.grads or settings.sft:
        check_trains(side, "--sft" if settings.sft else "--grads")
    config = config_within(side.limits, checkpoint.config)
    training = None
    if settings.sft:
        calls, training = _conversations(settings, side, config)
    else:
        ids, calls = _input(settings, side, config)
        if settings.grads and side.trace is None:
            part = ids[: max(settings.tokens, default=LENGTH)]
            training = TrainingInput(training_task.make_batches(part))
    with (
        progress() as start,
        tempfile.TemporaryDirectory() as folder,
        np.errstate(all="ignore"),  # the report names activations that are not finite
    ):
        report = run_comparison(
            settings, checkpoint, config, side, calls, training, layers, start, Path(folder)
        )
    _write(report, settings)
    return 0 if report["verdict"]["holds"] else 1


def _require_language_model(path: Path) -> None:
    """Raise InputError for a reward model, of which --reward compares a training step."""
    if not is_gguf(path) and any(SCORE in Header(file).shapes for file in weight_files(path)):
        raise InputError(
            f"{path}: is a reward model ({SCORE} is its head); give --reward PAIRS to compare a "
            "training step of it, or a language model's directory"
        )


def _compare_reward(settings: CompareConfig) -> int:
    """Compare a training step of a reward model; return the exit code."""
    import numpy as np

    from reference_np.checkpoint import RewardCheckpoint

    from .comparison import reward_pairs
    from .comparison.progress import progress
    from .comparison.reward_step import compare_reward

    ckpt = Path(settings.ckpt)
    if is_gguf(ckpt):
        raise InputError(f"{ckpt}: --reward needs a reward model's directory, not a GGUF file")
    config = RewardCheckpoint(ckpt).config
    given = reward_pairs.read_reward_input(
        settings.reward,
        ckpt,
        settings.template,
        settings.margin or "small",
        settings.safety_loss,
        min(max(settings.tokens, default=reward_pairs.LENGTH), config.max_seq_len),
        config,
    )
    kind, _, suffix = settings.against.partition(":")
    if kind == "cuda":
        from .comparison.torch_side import require_cuda

        require_cuda(settings.against)
    dtype = suffix or settings.dtype or "float32"
    with progress() as start, np.errstate(all="ignore"):
        report = compare_reward(settings.ckpt, kind, dtype, given, start, settings.diagnose)
    _write(report, settings)
    return 0 if report["verdict"]["holds"] else 1


def _write(report: dict[str, Any], settings: CompareConfig) -> None:
    """Write the report to the files asked for, and its table to the terminal."""
    from rich.console import Console

    from .comparison import text_report

    if settings.html:
        from .comparison.html_report import page

        write_text(Path(settings.html).resolve(), page(report))
    if settings.json:
        text = json.dumps(report, allow_nan=False)
        if settings.json == "-":
            print(text)
        else:
            write_text(Path(settings.json).resolve(), text + "\n")
    if settings.json != "-":
        console = Console(highlight=False)
        console.width = max(console.width, 100) if not console.is_terminal else console.width
        text_report.print_report(report, console, settings.all)


def _check_outputs(settings: CompareConfig, files: Sequence[Path]) -> None:
    """Raise InputError where a report cannot be made, or would overwrite an input."""
    ckpt = Path(settings.ckpt)
    read = (settings.beside, settings.file, settings.sft, settings.reward)
    inputs: list[str | Path] = [*files, settings.against, *filter(None, read)]
    taken = {Path(path).resolve() for path in inputs}
    for flag in ("json", "html", "trace"):
        name = getattr(settings, flag)
        if name in ("", "-"):
            continue
        path = Path(name).resolve()
        if path in taken or (path.suffix in (".json", ".safetensors") and _in(path, ckpt)):
            raise InputError(f"--{flag} {name}: would overwrite an input or another report")
        require_writable(path, f"--{flag} {name}")
        taken.add(path)
    if settings.html and importlib.util.find_spec("matplotlib") is None:
        raise InputError("--html needs matplotlib; pip install 'llama-parity[plot]'")


def _in(path: Path, ckpt: Path) -> bool:
    """Return whether a path is an existing file of the checkpoint's own directory."""
    return ckpt.is_dir() and path.parent == ckpt.resolve() and path.exists()


def _input(
    settings: CompareConfig, side: "Side", config: "LlamaConfig"
) -> "tuple[Array, Sequence[Call]]":
    """Return the token ids [n] and the calls to run; a trace has its own calls, and no ids.

    Raises InputError for flags of the input beside a trace.
    """
    import numpy as np

    from .comparison.inputs import make_calls, token_ids

    if side.trace is not None:
        for flag in ("prompt", "file", "ids", "tokens"):
            if getattr(settings, flag):
                raise InputError(f"--{flag}: a trace is compared on its own tokens; leave it out")
        return np.zeros(0, np.int64), side.trace.calls
    ids = token_ids(
        config,
        prompt=settings.prompt,
        file=settings.file,
        ids=settings.ids,
        limit=max(settings.tokens, default=config.max_seq_len),
    )
    given = settings.prompt or settings.file or settings.ids
    lengths = settings.tokens or ((len(ids),) if given else (LENGTH,))
    return ids, make_calls(ids, config, lengths, settings.steps, side.limits)


def _conversations(
    settings: CompareConfig, side: "Side", config: "LlamaConfig"
) -> "tuple[Sequence[Call], TrainingInput]":
    """Return the calls and the training step of the conversations of --sft.

    Raises InputError for a checkpoint without a tokenizer, and for conversations that are none.
    """
    from .comparison import conversations
    from .comparison.run import TrainingInput

    length = min(max(settings.tokens, default=conversations.LENGTH), config.max_seq_len)
    found = conversations.read_conversations(
        settings.sft, Path(settings.ckpt), settings.template, length, config, side.limits
    )
    is_ours = settings.against.partition(":")[0] in ("torch", "cuda")
    rows = conversations.label_rows(found.segments) if is_ours else []
    return found.calls, TrainingInput(found.batches, rows, [found.note])


if __name__ == "__main__":
    sys.exit(main())
