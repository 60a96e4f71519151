"""Train a Llama on text: ``python -m llama_torch.train``, no arguments needed."""

import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from llama_common import cli
from llama_common.errors import printable, quoted

from .checkpoint import step_folders
from .checkpoint.file_names import RUN_FILE
from .common.torchrun import exit_process, is_launched, is_main_process, is_restarted
from .config import TrainConfig
from .data.text_files import require_found
from .training import run_dir
from .training.parallel_layout import check_parallel_layout
from .training.run_length import steps_done
from .training.signals import Stopped


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return cli.run(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
    if not is_launched():
        return _train(_resolve(argv))
    from .distributed.job import PeerLostError, broadcast_object, job  # imports torch

    try:
        with job():
            return _train(broadcast_object(lambda: _resolve(argv)))
    except PeerLostError as error:
        if is_main_process():
            print(
                f"error: another process of this job ended ({error}); it or torchrun says why. "
                "Continue with --resume, as torchrun does by itself given --max-restarts",
                file=sys.stderr,
            )
        return 1


def _resolve(argv: Sequence[str]) -> TrainConfig:
    config = run_dir.resolve_config(run_dir.flags_after_restart(argv) if is_restarted() else argv)
    check_parallel_layout(config)
    require_found(config.data.data)
    return config


def _train(config: TrainConfig) -> int:
    # These import torch, which takes seconds: --help and a wrong flag are answered without.
    from .training import dry_run
    from .training.loop import train
    from .training.progress import perplexity

    if config.dry_run:
        return dry_run.report(config)
    was_finished = config.resume and steps_done(Path(config.out)) == config.steps
    started = time.perf_counter()
    try:
        val_loss = train(config)
    except KeyboardInterrupt as error:
        stopped = error if isinstance(error, Stopped) else Stopped(signal.SIGINT)
        if is_main_process():
            print(_stop_message(stopped, config.out), file=sys.stderr)
        return 128 + stopped.signum
    if not is_main_process():
        return 0
    result = f"validation loss {val_loss:.3f}, perplexity {perplexity(val_loss):.1f}"
    if was_finished:
        print(_finished_message(config, result))
        return 0
    print(
        f"finished in {time.perf_counter() - started:.0f} s: {result}, "
        f"checkpoint in {printable(config.out)}\n{_next_commands(config)}"
    )
    return 0


def _next_commands(config: TrainConfig) -> str:
    return (
        "next:\n"
        f"  python tools/compare.py {quoted(config.out + '/model.safetensors')}\n"
        f"  python -m llama_torch.generate --ckpt {quoted(config.out)} "
        f"--prompt {quoted(config.sample_prompt)}"
    )


def _finished_message(config: TrainConfig, result: str) -> str:
    return (
        f"{printable(config.out)} was finished already: {config.steps} of {config.steps} steps, "
        f"{result}\n"
        "to train it longer:\n"
        f"  {_resume_command(config.out)} --steps {2 * config.steps}"
    )


def _stop_message(stopped: Stopped, out: str) -> str:
    name = signal.Signals(stopped.signum).name
    if not (Path(out) / RUN_FILE).exists():
        return f"stopped by {name} before the run began; nothing was written"
    if stopped.saved is None and not step_folders.steps(Path(out)):
        command = _resume_command(out)
        return f"stopped by {name} before the first checkpoint; begin again with: {command}"
    saved = "at the last checkpoint" if stopped.saved is None else f"after step {stopped.saved}"
    return f"stopped by {name}; continue {saved} with: {_resume_command(out)}"


def _resume_command(out: str) -> str:
    launcher = "torchrun ..." if is_launched() else "python"
    return f"{launcher} -m llama_torch.train --resume --out {quoted(out)}"


if __name__ == "__main__":
    exit_process(main)
