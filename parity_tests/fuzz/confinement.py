"""Watch what a reader does to the file system: an audit hook sees each file that Python opens.

What libraries in other languages open by themselves it does not see; they are given the paths of
files that Python has looked at before. Nor does it see into the process that renders chat
templates, the only one that may begin.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_torch
from llama_torch.tokenizer import template_process

# Events that name files, and at which of their arguments.
READS = {"open": (0,), "os.listdir": (0,), "os.scandir": (0,)}
WRITES = {
    **dict.fromkeys(("os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate"), (0,)),
    **dict.fromkeys(("os.utime", "os.chown", "os.mkfifo", "os.mknod"), (0,)),
    **dict.fromkeys(("os.rename", "os.link", "os.symlink"), (0, 1)),
}
# Events that no reader has a reason for.
NEVER = (
    *("subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn"),
    *("socket.", "pickle.find_class", "ctypes.dlopen", "os.chdir"),
)
# Python's own: modules are imported when they are first needed.
LIBRARIES = tuple({sys.prefix, sys.base_prefix, str(Path(llama_torch.__file__).parent.parent)})
SYSTEM = (
    "/proc/",
    "/dev/null",
    "/dev/urandom",
    "/sys/",
    "/usr/share/zoneinfo",
    "/etc/localtime",
)


class _Watch:
    folder: str | None = None  # None = nothing is watched
    writes = False
    breaches: list[str]


_watch = _Watch()


class EscapedError(BaseException):
    """A reader did what it must not; no ``except Exception`` stops this."""


@contextlib.contextmanager
def confined(folder: Path, writes: bool) -> Iterator[None]:
    """Raise AssertionError for a body that opens or changes files outside of ``folder``.

    Reading Python's own modules is allowed; so is writing in ``folder`` if ``writes``. The body
    runs in ``folder``, as the hook is not told which open folder a relative name begins at.
    """
    _install()
    with contextlib.chdir(folder):
        _watch.breaches, _watch.writes = [], writes
        _watch.folder = os.path.realpath(folder)
        try:
            yield
        except EscapedError:
            pass
        finally:
            _watch.folder = None
    assert not _watch.breaches, _watch.breaches[:3]


_installed: list[bool] = []


def _install() -> None:
    """Add the hook, once: Python has no way to remove one."""
    if not _installed:
        _installed.append(True)
        sys.addaudithook(_hook)


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watch.folder is None:
        return
    for table in (READS, WRITES):
        for at in table.get(event, ()):
            is_write = table is WRITES or (event == "open" and _opens_to_write(arguments))
            _require(event, arguments[at], is_write)
    if event.startswith(NEVER) and not _begins_templates(event, arguments):
        _breach(f"{event}{arguments!r:.200}")


def _begins_templates(event: str, arguments: tuple[Any, ...]) -> bool:
    """Return whether an event begins the process that renders chat templates."""
    return event == "subprocess.Popen" and template_process.PROGRAM in arguments[1]


def _opens_to_write(arguments: tuple[Any, ...]) -> bool:
    mode, flags = arguments[1], arguments[2]
    if isinstance(mode, str):
        return bool(set(mode) & set("wax+"))
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))


def _require(event: str, path: Any, is_write: bool) -> None:
    if path is None or isinstance(path, int):  # a file that is open already
        return
    folder, _watch.folder = _watch.folder, None  # what follows looks at files itself
    try:
        real = os.path.realpath(os.fsdecode(path))
    except ValueError:  # a zero byte: nothing is opened
        return
    finally:
        _watch.folder = folder
    assert folder is not None
    if event == "os.listdir" and real in sys.path:
        allowed = True  # a search for a module
    elif f"{real}/".startswith(f"{folder}/"):
        allowed = _watch.writes or not is_write
    elif is_write:
        allowed = real == os.devnull
    else:
        allowed = _is_library(real) or real.startswith(SYSTEM)
    if not allowed:
        _breach(f"{event} {'writes' if is_write else 'reads'} {real}")


def _is_library(path: str) -> bool:
    return any(f"{path}/".startswith(f"{top}/") for top in LIBRARIES)


def _breach(what: str) -> None:
    _watch.breaches.append(what)
    raise EscapedError(what)
