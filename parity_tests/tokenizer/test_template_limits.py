"""Chat templates that never end, or write without end: one line, in bounded time and memory."""

import os
import resource
import signal
import threading
from pathlib import Path

import pytest

from llama_common.errors import InputError
from llama_torch.tokenizer import template_process
from llama_torch.tokenizer.chat_template import LONGEST, ChatTemplate, load_chat_template
from llama_torch.tokenizer.loading import load_tokenizer
from llama_torch.tokenizer.tokenizer import Gpt2

from ..support.tokenizers import byte_level

TURNS = [{"role": "user", "content": "Hello"}]
GOOD = "{{ bos_token }}{% for m in messages %}{{ m['content'] | trim }}{% endfor %}"
# Of each, what the message says. Those that take time have one second.
COMPILED = {
    "parentheses": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", ""),
    "lists": ("{{ " + "[" * 300 + "]" * 300 + " }}", ""),
    "blocks": ("{% if 1 %}" * 300 + "{% endif %}" * 300, ""),
    "loops": ("{% for a in 'b' %}" * 30 + "{% endfor %}" * 30, ""),
    "minus": ("{{ " + "-" * 20000 + "1 }}", ""),
    "digits": ("{{ " + "9" * 5000 + " }}", ""),
    "power": ("{{ 9 ** (9**9) % 2 }}", "processor time"),
    "tag": ("{% unknown %}", "unknown tag"),
}
RENDERED = {
    "half a character": ("{{ '\\ud800' }}", "half of a pair"),
    "power": ("{% set n = 9 %}{{ n ** (n**n) % 2 }}", "processor time"),
    "letters": ("{{ 'a' * 10**8 }}", "more than"),
    "gigabytes": ("{{ 'a' * 10**10 }}", "memory"),
    "loops": (
        "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3,
        "processor time",
    ),
    "width": ("{{ '%100000000d' % 1 }}", "more than"),
    "filter": ("{{ '%1000000000d' | format(1) }}", "memory"),
    "format": ("{{ '{:>1000000000}'.format(1) }}", "memory"),
    "center": ("{{ 'a' | center(10**10) }}", "memory"),
    "ljust": ("{{ messages[0].content.ljust(10**10) }}", "memory"),
    "join": ("{{ (['a'] * 10**8) | join(',') }}", "memory"),
    "doubling": (
        "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}"
        "{% endfor %}{{ n.s }}",
        "memory",
    ),
    "shared": (
        "{% set n = namespace(s=[1]) %}{% for i in range(99) %}{% set n.s = [n.s, n.s] %}"
        "{% endfor %}{{ n.s | tojson }}",
        "",
    ),
    "macro": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    "output": ("{% for a in range(99999) %}{{ 'a' * 200 }}{% endfor %}", "characters"),
    "lines": ("{{ raise_exception('a\nerror: b\x1b[2J') }}", r"a error: b\x1b[2J"),
    "range": ("{{ range(10**9) | list }}", "too big"),
}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "SECONDS", 1)
    monkeypatch.setattr(template_process, "MEMORY", 256)


def require_good() -> None:
    tokenizer = Gpt2()
    found = ChatTemplate(GOOD, "good", tokenizer).encode(TURNS)
    assert found == [tokenizer.special["<|endoftext|>"], *tokenizer.encode("Hello")]


@pytest.mark.parametrize("name", COMPILED)
def test_what_breaks_the_compiler_is_refused(name: str) -> None:
    source, said = COMPILED[name]
    with pytest.raises(InputError, match="^here: (not a Jinja template|the template fails)") as e:
        ChatTemplate(source, "here", Gpt2()).encode(TURNS)
    assert said in str(e.value)
    assert len(str(e.value)) < 1500
    require_good()


@pytest.mark.parametrize("name", RENDERED)
def test_what_never_ends_is_refused(name: str) -> None:
    source, said = RENDERED[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="^here: ") as e:
        ChatTemplate(source, "here", Gpt2()).encode(TURNS)
    assert said in str(e.value), str(e.value)
    assert str(e.value).isprintable()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 100 << 10, "KiB in this process"
    require_good()


def test_a_long_conversation_is_no_fault() -> None:
    tokenizer = Gpt2()
    turns = [{"role": "user", "content": "word " * 60_000}] * 3
    assert len(ChatTemplate(GOOD, "good", tokenizer).encode(turns)) > 150_000


def test_a_file_that_is_too_long_is_no_template(tmp_path: Path) -> None:
    byte_level(tmp_path)
    tokenizer = load_tokenizer(tmp_path, 700)
    path = tmp_path / "long.jinja"
    path.write_text("a" * (LONGEST + 1))
    for name in (str(path), "/dev/zero"):
        with pytest.raises(InputError, match="longer than a template"):
            load_chat_template(tmp_path, tokenizer, name)
    path.write_text("a\r\n")
    assert load_chat_template(tmp_path, tokenizer, str(path)).encode(TURNS)


def test_its_process_may_die_and_is_started_again() -> None:
    require_good()
    worker = template_process._worker
    assert worker is not None
    os.kill(worker.process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, worker.process.pid, os.WEXITED | os.WNOWAIT)
    require_good()
    worker = template_process._worker
    os.kill(worker.process.pid, signal.SIGSTOP)
    timer = threading.Timer(0.2, os.kill, (worker.process.pid, signal.SIGKILL))
    timer.start()
    with pytest.raises(InputError, match="process that renders it ended with code -9"):
        ChatTemplate(GOOD, "here", Gpt2())
    timer.join()
    require_good()


def test_a_forked_process_starts_its_own() -> None:
    require_good()
    assert template_process._worker is not None
    template_process._worker.owner = 1
    worker = template_process._worker.process
    require_good()
    assert template_process._worker.process is not worker
    assert worker.returncode == 0
    os.waitpid(worker.pid, 0)  # it ended since the last copy of its pipe was closed


def test_an_interrupted_answer_is_not_the_next_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(template_process.select, "select", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ChatTemplate("one", "here", Gpt2())
    require_good()


def test_it_waits_no_longer_than_its_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    require_good()
    monkeypatch.setattr(template_process, "PATIENCE", 0)
    with pytest.raises(InputError, match="it takes more than 0 s"):
        ChatTemplate("{{ 9 ** (9**9) }}", "here", Gpt2())
