"""Choose, claim, lock and check a run directory."""

import dataclasses
import glob
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_common import cli
from llama_common.errors import InputError, is_digits, printable, quoted
from llama_common.files import open_lock, require_writable_below, try_lock, write_text
from llama_common.settings import Settings, flag_names, read_toml

from ..checkpoint import step_folders
from ..checkpoint.directory_files import write_directory_files
from ..checkpoint.file_names import AROUND, MODEL_FILE, RUN_FILE, STATE_FILE
from ..checkpoint.step_folders import BEST
from ..common.torchrun import job_name
from ..config import RunConfig, TrainConfig
from ..data.text_files import names_text
from .origin import Origin, parse_config
from .parallel_layout import resumed_layout
from .run_file import read_run, write_record
from .run_length import require_same_length, require_steps_left, steps_done

if TYPE_CHECKING:
    from ..distributed.parallel import Parallel

RUNS = Path("runs")

LOCK_FILE = "lock"

EVENTS_FOLDER = "tensorboard"


def resolve_config(argv: Sequence[str], config_class: type[RunConfig] = TrainConfig) -> RunConfig:
    """Return a run's config from defaults, then TOML, then flags; ``out`` is filled in.

    With --resume the run's own stored settings take the defaults' place. Raises InputError for
    a setting that is wrong or missing, a directory that holds another run, or one that cannot be
    written.
    """
    early = cli.early_flags(argv, config_class)
    settings = read_toml(early.config, config_class) if early.config else {}
    if not early.resume:
        init_from = _named("init_from", early.init_from, settings)
        config = parse_config(argv, settings, init_from, config_class)
        config.require_complete()
        config = dataclasses.replace(_absolute(config), out=config.out or str(_next_run()))
        _require_free(Path(config.out))
        return config
    named = _named("out", early.out, settings)
    out = Path(named) if named else _last_worked_on()
    record = read_run(out)
    if record.config_class is not config_class:
        raise InputError(
            f"--resume: {out} is a run of another command; continue it with "
            f"{record.config_class.command} --resume --out {quoted(str(out))}"
        )
    stored = dict(record.settings)
    config = cli.parse(config_class, argv, stored | settings)
    parallel = resumed_layout(config.parallel, stored, {*flag_names(argv), *settings})
    config = dataclasses.replace(_absolute(config), out=str(out), parallel=parallel)
    if early.steps is None:
        source = settings["steps"].source if "steps" in settings else str(record.path)
        require_same_length(record, config.steps, source)
    require_steps_left(record, config.steps, steps_done(out))
    found: dict[str, Any] = {}
    for name in config.data.paths:
        patterns = getattr(config.data, name)
        if name in stored and patterns == stored[name].value:  # else named anew
            found[name] = tuple(find_again(p, record.directory, "--resume") for p in patterns)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **found))


def _named(name: str, flag: str | None, settings: Settings) -> str:
    """Return the directory that a flag or else a TOML file names; empty = none."""
    directory: str = settings[name].value if flag is None and name in settings else flag or ""
    return directory


def _absolute(config: RunConfig) -> RunConfig:
    """Return the config with absolute paths but for --data: a run may be resumed anywhere."""
    path = config.init_from and os.path.abspath(config.init_from)
    return dataclasses.replace(config, init_from=path, data=config.data.absolute())


def find_again(pattern: str, directory: str, source: str) -> str:
    """Return a stored value of --data, relative to here or to ``directory``, where the run began.

    Raises InputError, which begins with ``source``, where it names no text in either.
    """
    if os.path.isabs(pattern) or names_text(pattern):
        return pattern
    if directory:
        if os.path.exists(found := os.path.join(directory, pattern)):
            return found
        # The directory's own name may hold a glob's characters, and then match a sibling's.
        if names_text(found := os.path.join(glob.escape(directory), pattern)):
            return found
    here = os.getcwd()
    began = f" nor in {directory}, where the run began" if directory not in ("", here) else ""
    raise InputError(
        f"{source}: --data {pattern}: no file found in {here}{began}; name the same text by "
        "--data, or run this in the folder that holds it"
    )


def flags_after_restart(
    argv: Sequence[str], config_class: type[RunConfig] = TrainConfig
) -> Sequence[str]:
    """Return the flags with which a job that torchrun restarted resumes its run.

    It is the run with the job's name, in --out if that was given.
    """
    early = cli.early_flags(argv, config_class)
    settings = read_toml(early.config, config_class) if early.config else {}
    named = _named("out", early.out, settings)
    outs = [Path(named)] if named else list(_runs().values())
    began = (out for out in outs if (out / RUN_FILE).is_file())
    found = [out for out in began if read_run(out).job == job_name()]
    if early.resume or not found:
        return argv
    out = str(found[-1])
    return [*argv, "--resume", "--out", f"./{out}" if out.startswith("-") else out]


def require_shared(out: Path, parallel: "Parallel") -> None:
    """Raise InputError unless all processes of a job see the same run in ``out``."""
    parallel.barrier()
    newest = step_folders.newest(out) if (out / RUN_FILE).is_file() else None
    seen = -1 if not (out / RUN_FILE).is_file() else int(newest.name) if newest else 0
    with parallel.errors_on_main_only():
        if not parallel.all_equal(seen):
            raise InputError(
                f"--out {out}: not every process sees what the first one wrote there; choose a "
                "directory on a disk that all machines share"
            )


def _runs() -> dict[int, Path]:
    numbered = {int(p.name): p for p in RUNS.glob("*") if is_digits(p.name)}
    return dict(sorted(numbered.items()))


def _next_run() -> Path:
    return RUNS / str(max(_runs(), default=0) + 1)


def _last_worked_on() -> Path:
    """Return the run in runs/ whose files are the newest, and print which it is; InputError."""
    runs = [path.parent for path in sorted(RUNS.glob(f"*/{RUN_FILE}"))]
    if not runs:
        raise InputError("--resume: no run in runs/; name its directory with --out")
    out = max(runs, key=_time_of_work)
    of_all = f", the last worked on of {len(runs)} in runs/" if len(runs) > 1 else ""
    print(f"note: --resume continues {printable(str(out))}{of_all}", file=sys.stderr)
    return out


def _time_of_work(out: Path) -> int:
    """Return when the newest of a run's own files was written, in nanoseconds."""
    names = (RUN_FILE, LOCK_FILE, MODEL_FILE, step_folders.FOLDER)
    folders = (step_folders.FOLDER, EVENTS_FOLDER)
    paths = [
        *(out / name for name in names),
        *(p for name in folders for p in out.glob(f"{name}/*")),
    ]
    times = [0]
    for path in paths:
        with suppress(OSError):  # it is not there; a trainer may just have deleted it
            times.append(path.stat().st_mtime_ns)
    return max(times)


def _require_free(out: Path) -> None:
    try:
        _require_free_and_writable(out)
    except OSError as error:
        raise InputError(f"--out {out} cannot be used ({error}); choose another") from None


def _require_free_and_writable(out: Path) -> None:
    if (out / RUN_FILE).exists():
        raise InputError(
            f"--out {out} already holds a run; add --resume to continue it, or choose another"
        )
    files = (MODEL_FILE, STATE_FILE, "config.json", *AROUND)
    for name in (*files, step_folders.FOLDER, BEST):
        if (out / name).exists():
            raise InputError(f"--out {out} already holds a {name}; choose another directory")
    require_writable_below(out)


def _require_own_folders(out: Path) -> None:
    """Raise InputError for a link in place of a folder: what is written there is another's."""
    for name in (step_folders.FOLDER, BEST, EVENTS_FOLDER, LOCK_FILE):
        if (out / name).is_symlink():
            raise InputError(
                f"{out / name}: is a link, and a run writes to its own files alone; put the file "
                "or folder itself there, or delete the link"
            )


@contextmanager
def lock(out: Path) -> Iterator[None]:
    """Lock a run directory, made if need be; InputError if another trainer holds its lock.

    The lock is the open file's and dies with the process; the file stays. A file system without
    locks holds nobody back.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        _require_own_folders(out)
        file = os.fdopen(open_lock(out / LOCK_FILE), "r+b", buffering=0)
    except OSError as error:
        raise InputError(f"--out {out} cannot be written ({error}); choose another") from None
    with file:
        # Data workers may outlive a killed trainer, and must not hold the run meanwhile.
        os.register_at_fork(after_in_child=file.close)
        is_free = True
        with suppress(OSError):
            is_free = try_lock(file.fileno())
        if not is_free:
            raise InputError(
                f"--out {out} is in use by another trainer; wait for its end, or choose another"
            )
        yield


def claim(
    config: RunConfig, data_key: str, origin: Origin, texts: Mapping[str, str] | None = None
) -> None:
    """Write run.json, config.json and the tokenizer's files into a new, locked directory.

    ``texts`` are files by name, in place of the tokenizer's own.
    """
    out = Path(config.out)
    _require_free(out)  # another run may have come and gone while this one was prepared
    record = {
        "task": config.task,
        "identity": config.identity(),
        "data_key": data_key,
        "job": job_name(),
        "directory": os.getcwd(),  # where a relative --data is looked for again
        "settings": dataclasses.asdict(dataclasses.replace(config, profile=False)),
    }
    try:
        write_record(out / RUN_FILE, record)
        write_directory_files(out, origin.model, origin.directory)
    except OSError as error:
        raise InputError(f"--out {out} cannot be written ({error}); choose another") from None
    write_texts(out, texts or {})


def write_texts(out: Path, texts: Mapping[str, str]) -> None:
    """Write files, by name, into a run directory; those that hold the text already are left."""
    try:
        for name, text in texts.items():
            path = out / name
            if not path.is_file() or path.read_text(encoding="utf-8", errors="replace") != text:
                write_text(path, text)
    except OSError as error:
        raise InputError(f"--out {out} cannot be written ({error}); choose another") from None
