"""Compile and render chat templates in a process of their own, with limits.

Jinja's sandbox keeps a template from Python's objects, but not from a loop in a loop in a loop,
from ``'a' * 10**9`` or from a list that holds itself twice, forty times over. One process serves
all templates; it starts with the first, which takes 0.2 s, and ends with this one. Bounded are its
processor time and memory, by the operating system (memory on Linux alone), the time that its answer
takes, and the text that it writes. It has this user's rights: what keeps it from files is the
sandbox.
"""

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .tracked_text import Tracked

SECONDS = 10  # of processor time, for one template or conversation
PATIENCE = 60  # seconds of waiting: the processor may be busy with others
MEMORY = 512  # MiB beside Python's own
# Of a rendered text, beside as much as the conversation has: a million tokens are fewer.
CHARACTERS = 1 << 23
PROGRAM = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    f"from {__package__}.template_worker import main; main()"
)


class TemplateError(Exception):
    """A template that cannot be compiled or rendered; the message says why, on one line."""


def used_names(source: str) -> set[str]:
    """Return the names that a template uses but does not set; TemplateError if it is none."""
    return set(_ask({"source": source}, 0)["used"])


def render(
    source: str,
    messages: Sequence[Mapping[str, str]],
    names: Mapping[str, str],
    prompts: bool = True,
    day: str = "",
) -> Tracked:
    """Return a conversation (roles and contents) as a template writes it.

    names    spellings of tokens, by the names that the template has for them.
    prompts  whether the text ends where the assistant's next message begins.
    day      the date that the template sees (ISO 8601); empty = today.
    Raises TemplateError where the template fails, or takes more than it may.
    """
    given = [{"role": m["role"], "content": m["content"]} for m in messages]
    n_characters = sum(len(m["content"]) for m in given)
    request = {"source": source, "messages": given, "names": dict(names)}
    found = _ask(request | {"prompts": prompts, "day": day}, n_characters)
    return Tracked(found["text"], found["origins"])


def _ask(request: dict[str, Any], n_characters: int) -> dict[str, Any]:
    """Return the answer to a request; TemplateError says what went wrong in the template."""
    request["limits"] = (SECONDS, MEMORY, CHARACTERS + n_characters)
    global _worker
    with _lock:
        if _worker is not None and not _worker.is_usable():
            _worker.end()
            _worker = None
        _worker = _worker or _Worker()
        try:
            answer = _worker.ask(json.dumps(request).encode() + b"\n")
        except BaseException:  # Ctrl-C as well: what it says next answers an earlier request
            _worker.end()
            raise
        if answer.get("ends"):
            _worker.end()
    if "error" in answer:
        raise TemplateError(answer["error"])
    return answer


class _Worker:
    """A running ``template_worker``."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        try:
            self.process = subprocess.Popen(
                # Our own path, so that it finds what we have found.
                [sys.executable, "-c", PROGRAM, json.dumps([str(Path(p)) for p in sys.path])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for this process
            )
        except OSError as error:
            raise TemplateError(f"the process for templates cannot start: {error}") from None

    def is_usable(self) -> bool:
        """Return whether it runs and is this process's own: a fork shares its pipes."""
        if self.owner != os.getpid():
            self.process.returncode = 0  # so that nobody waits for another's child
        return self.process.poll() is None

    def ask(self, request: bytes) -> dict[str, Any]:
        """Send a request and return the answer, an object."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(request)
            self.process.stdin.flush()
        found: dict[str, Any] = json.loads(self._line())
        return found

    def _line(self) -> bytes:
        assert self.process.stdout is not None
        pipe, end = self.process.stdout.fileno(), time.monotonic() + PATIENCE
        line = bytearray()
        while not line.endswith(b"\n"):
            if not select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TemplateError(f"it takes more than {PATIENCE} s")
            part = os.read(pipe, 1 << 20)
            if not part:
                raise TemplateError(self._how_it_ended())
            line += part
        return bytes(line)

    def _how_it_ended(self) -> str:
        code = self.process.wait()
        if code == -signal.SIGXCPU:
            return f"it takes more than {SECONDS} s of processor time"
        return f"the process that renders it ended with code {code}"

    def end(self) -> None:
        """Close the pipes, and end the process if it is ours."""
        if self.is_usable():
            self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self.process.wait()


_lock = threading.Lock()
_worker: _Worker | None = None


@atexit.register
def _end_worker() -> None:
    if _worker is not None:
        _worker.end()
