"""The process that renders chat templates, one request and one answer a line of JSON.

It is started by ``template_process`` and imports jinja2 and ``tracked_text`` alone. A template is a
program that somebody else wrote: it runs in jinja's sandbox, which keeps it from Python's objects,
and in this process, whose memory and processor time the operating system limits.
"""

import contextlib
import datetime
import functools
import json
import math
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .tracked_text import MESSAGE, Tracked, origins_of, parse, track, written


class Generation(jinja2.ext.Extension):
    """The tag ``{% generation %}``, by which templates mark the assistant's words for trainers."""

    tags = {"generation"}  # noqa: RUF012  (as the base class has it)

    def parse(self, parser: Any) -> Any:
        """Leave the tag out and its content in."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def main() -> None:
    """Answer requests until the other process closes its end."""
    limit(resource.RLIMIT_CORE, 0)
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(json.dumps(answer(json.loads(line))).encode() + b"\n")
        sys.stdout.buffer.flush()


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a request asks for, or its ``error`` on one line.

    source   the template; alone, the answer has the names that it uses but does not set.
    names    spellings of tokens, by the names that the template has for them.
    prompts  whether the text ends where the assistant's next message begins.
    day      the date that the template sees (ISO 8601); empty = today.
    messages the conversation to render: the answer has its ``text``, and the ``origins`` of that.
    limits   seconds of processor time, MiB of memory, characters of text.
    """
    seconds, memory, characters = request["limits"]
    limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + seconds))
    limit(resource.RLIMIT_AS, at_start(), memory << 20)
    try:
        template, used = compiled(request["source"])
        if "messages" not in request:
            return {"used": used}
        text = template.render(
            messages=[
                {"role": written(m["role"]), "content": Tracked(m["content"], MESSAGE)}
                for m in request["messages"]
            ],
            add_generation_prompt=request["prompts"],
            tools=None,
            documents=None,
            **_clock(request["day"]),
            **{name: written(spelling) for name, spelling in request["names"].items()},
        )
    except MemoryError:  # the next template is for a process that has its memory free
        return {"error": f"it takes more than {memory} MiB of memory", "ends": True}
    except Exception as error:  # a template is a program: it fails in any way
        return {"error": " ".join(str(error)[:1000].split()) or type(error).__name__}
    if len(text) > characters:
        return {"error": f"it writes {len(text):,} characters, more than {characters:,}"}
    return {"text": text, "origins": origins_of(text)}


@functools.cache
def at_start() -> int:
    """Return the bytes of address space that this process had at the first call, where known."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    return 0


def limit(kind: int, *amounts: int) -> None:
    """Limit a resource of this process to a sum, where the system can and allows it."""
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(kind, (sum(amounts), resource.getrlimit(kind)[1]))


@functools.lru_cache(maxsize=8)
def compiled(source: str) -> tuple[jinja2.Template, list[str]]:
    """Return a template, and the names that it uses but does not set."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, Generation]
    )
    track(environment)
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    used = jinja2.meta.find_undeclared_variables(environment.parse(source))
    return environment.from_string(parse(environment, source)), sorted(used)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _clock(day: str) -> dict[str, Any]:
    """Return the template's clock, in place of ``_now``, if it stands still."""
    return {"strftime_now": datetime.datetime.fromisoformat(day).strftime} if day else {}


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)
