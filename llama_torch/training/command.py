"""What the commands that train share: from the command line to an exit code."""

import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llama_common import cli
from llama_common.errors import flag_of, printable, quoted

from ..checkpoint import step_folders
from ..checkpoint.file_names import RUN_FILE
from ..common.torchrun import is_launched, is_main_process, is_restarted
from ..config import RunConfig
from ..data.text_files import named_by, require_found
from . import run_dir
from .parallel_layout import check_parallel_layout
from .run_length import steps_done
from .signals import Stopped

if TYPE_CHECKING:
    from .task import Task


def run_command(
    argv: Sequence[str] | None,
    config_class: type[RunConfig],
    make_task: Callable[[], "Task"] | None = None,
) -> int:
    """Run the command line of a kind of run; return its exit code.

    argv       the words after the command; None: those that this process was started with.
    make_task  returns what is trained, and may import torch; None: a Task.
    """
    words = sys.argv[1:] if argv is None else argv
    return cli.run(lambda: _main(words, config_class, make_task))


def _main(
    argv: Sequence[str],
    config_class: type[RunConfig],
    make_task: Callable[[], "Task"] | None,
) -> int:
    if not is_launched():
        return _train(_resolve(argv, config_class), make_task)
    from ..distributed.job import PeerLostError, broadcast_object, job  # imports torch

    try:
        with job():
            return _train(broadcast_object(lambda: _resolve(argv, config_class)), make_task)
    except PeerLostError as error:
        if is_main_process():
            print(
                f"error: another process of this job ended ({error}); it or torchrun says why. "
                "Continue with --resume, as torchrun does by itself given --max-restarts",
                file=sys.stderr,
            )
        return 1


def _resolve(argv: Sequence[str], config_class: type[RunConfig]) -> RunConfig:
    if is_restarted():
        argv = run_dir.flags_after_restart(argv, config_class)
    config = run_dir.resolve_config(argv, config_class)
    check_parallel_layout(config)
    for name in config.data.paths:
        with named_by(flag_of(name)):
            require_found(getattr(config.data, name))
    return config


def _train(config: RunConfig, make_task: Callable[[], "Task"] | None) -> int:
    # These import torch, which takes seconds: --help and a wrong flag are answered without.
    from . import dry_run
    from .loop import train
    from .objective import shown

    task = make_task() if make_task else None
    if config.dry_run:
        return dry_run.report(config, task)
    was_finished = config.resume and steps_done(Path(config.out)) == config.steps
    started = time.perf_counter()
    try:
        measured = train(config, task)
    except KeyboardInterrupt as error:
        stopped = error if isinstance(error, Stopped) else Stopped(signal.SIGINT)
        if is_main_process():
            print(_stop_message(stopped, config), file=sys.stderr)
        return 128 + stopped.signum
    if not is_main_process():
        return 0
    result = f"validation loss {measured.loss:.3f}{shown(measured.values, ', ')}"
    if was_finished:
        print(_finished_message(config, result))
        return 0
    print(
        f"finished in {time.perf_counter() - started:.0f} s: {result}, "
        f"checkpoint in {printable(config.out)}{_next_commands(config)}"
    )
    return 0


def _next_commands(config: RunConfig) -> str:
    commands = config.next_commands()
    return "".join(f"\n{line}" for line in ["next:", *(f"  {c}" for c in commands)] if commands)


def _finished_message(config: RunConfig, result: str) -> str:
    return (
        f"{printable(config.out)} was finished already: {config.steps} of {config.steps} steps, "
        f"{result}\n"
        "to train it longer:\n"
        f"  {_resume_command(config)} --steps {2 * config.steps}"
    )


def _stop_message(stopped: Stopped, config: RunConfig) -> str:
    out = config.out
    name = signal.Signals(stopped.signum).name
    if not (Path(out) / RUN_FILE).exists():
        return f"stopped by {name} before the run began; nothing was written"
    if stopped.saved is None and not step_folders.steps(Path(out)):
        command = _resume_command(config)
        return f"stopped by {name} before the first checkpoint; begin again with: {command}"
    saved = "at the last checkpoint" if stopped.saved is None else f"after step {stopped.saved}"
    return f"stopped by {name}; continue {saved} with: {_resume_command(config)}"


def _resume_command(config: RunConfig) -> str:
    command = config.command
    if is_launched():
        command = command.replace("python", "torchrun ...", 1)
    return f"{command} --resume --out {quoted(config.out)}"
