"""Every command in the pages is accepted by its program's parser; nothing is run."""

import argparse
import contextlib
import importlib
import io
import re
import sys
import tomllib
from collections.abc import Callable
from typing import Any

import pytest

from llama_common import cli
from llama_parity.command import test as suite_command
from llama_parity.command import vectors as vectors_command
from llama_parity.command.main import COMMANDS
from llama_torch.training.run_file import CONFIGS

from ..support.documents import (
    INLINE_COMMAND,
    ROOT,
    Command,
    blocks,
    commands,
    pages,
    spans,
    split_commands,
)
from ..support.import_table import sources

TEXTS = pages()
SOURCES = sources(ROOT)
# Programs of others, whose flags are theirs.
FOREIGN = {"python3", ".", "tensorboard", "lm_eval", "git", "ruff", "mypy", "bash", "cd", ".ci/run"}
BY_WORDS = {
    command.words: command
    for page, text in TEXTS.items()
    for block in blocks(page, text)
    for command in commands(block)
}
MENTIONED = {
    command.words: command
    for page, text in TEXTS.items()
    for span in spans(text)
    if INLINE_COMMAND.match(span)
    for command in split_commands(page, span)
    if command.words not in BY_WORDS
}


class Parsed(BaseException):
    """Raised after a command has parsed its flags, to stop it."""


def check(command: Command, config: pytest.Config, patch: pytest.MonkeyPatch) -> None:
    """Parse a command; an error names the page and line of one that is unknown or wrong."""
    program, *arguments = command.words
    if program == "python" and arguments[:1] == ["-m"]:
        check_module(command, arguments[1], arguments[2:], config, patch)
    elif program == "python" and arguments[0].startswith("tools/"):
        module = arguments[0].removesuffix(".py").replace("/", ".")
        check_module(command, module, arguments[1:], config, patch)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        read = get_args_parser().parse_args(arguments)
        check_module(command, read.training_script, read.training_script_args, config, patch)
    elif program == "pytest":
        check_pytest(command, arguments, config)
    elif program == "pip":
        check_pip(command, arguments)
    elif program == "llama-parity":
        check_llama_parity(command, arguments, config, patch)
    else:
        assert program in FOREIGN, f"{command.place}: nothing checks {program}; see FOREIGN"


def check_llama_parity(
    command: Command, arguments: list[str], config: pytest.Config, patch: pytest.MonkeyPatch
) -> None:
    """Parse a command of llama-parity; the suite's own flags and pytest's are parsed by pytest."""
    name, *rest = arguments
    if name == "test":
        known, left = suite_command._parser().parse_known_args(rest)
        assert known.profile in (None, *suite_command.PROFILES), f"there is no {known.profile}"
        check_pytest(
            command, [word for word in left if not suite_command.PORT.fullmatch(word)], config
        )
    elif name == "vectors":
        assert rest[0] in vectors_command.ACTIONS, f"{command.place}: there is no {rest[0]}"
        flags = {word for word in rest if word.startswith("-")}
        assert flags <= {vectors_command.ANGLES}, f"{command.place}: there is no {flags}"
    else:
        assert name in COMMANDS, f"{command.place}: there is no command {name}"
        check_module(command, f"llama_parity.{name}", rest, config, patch)


def check_module(
    command: Command,
    name: str,
    arguments: list[str],
    config: pytest.Config,
    patch: pytest.MonkeyPatch,
) -> None:
    """Run a module's command until it has parsed its flags."""
    assert name in SOURCES, f"{command.place}: there is no module {name}"
    if name == "parity_tests.support.processors":  # hands them on
        check_pytest(command, arguments, config)
        return
    trained = {f"llama_torch.{task}": config_class for task, config_class in CONFIGS.items()}
    if name in trained:  # which would look for the run that it resumes
        cli.parse(trained[name], arguments)
        return
    name = f"{name}.__main__" if f"{name}.__main__" in SOURCES else name  # a package
    stop_after(patch, cli, "parse")
    stop_after(patch, argparse.ArgumentParser, "parse_args")
    patch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(Parsed):
        raise AssertionError(f"{command.place}: exit code {importlib.import_module(name).main()}")


def stop_after(patch: pytest.MonkeyPatch, holder: Any, name: str) -> None:
    """Make a parser raise Parsed where it would return."""
    real: Callable[..., Any] = getattr(holder, name)

    def parse(*args: Any, **kwargs: Any) -> Any:
        real(*args, **kwargs)
        raise Parsed

    patch.setattr(holder, name, parse)


def check_pytest(command: Command, arguments: list[str], config: pytest.Config) -> None:
    known, unknown = config._parser.parse_known_and_unknown_args(arguments)
    wrong = [word for word in unknown if word.startswith("-")]
    assert not wrong, f"{command.place}: pytest knows no {', '.join(wrong)}"
    profile = getattr(known, "hypothesis_profile", None)
    if profile:
        importlib.import_module("hypothesis").settings.get_profile(profile)
    for path in known.file_or_dir:
        exists = (ROOT / path.partition("::")[0]).exists()
        assert exists or path == "...", f"{command.place}: there is no {path}"


def check_pip(command: Command, arguments: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extras in re.findall(r"^\.\[(.*)\]$", "\n".join(arguments), re.MULTILINE):
        wrong = set(extras.split(",")) - set(project["optional-dependencies"])
        assert not wrong, f"{command.place}: there is no extra {', '.join(wrong)}"


# How the parsers say that there is no such flag, file, module or extra.
UNKNOWN = re.compile(
    r"[Uu]nrecognized|no such flag|belongs to no flag|knows no|there is no|not registered"
    "|nothing checks"
)


@pytest.fixture
def complaint(
    pytestconfig: pytest.Config,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[[Command], str]:
    """Return a function from a command to its parser's error; "" if it has none."""

    def ask(command: Command) -> str:
        with contextlib.redirect_stdout(io.StringIO()):  # a parser may print its usage
            try:
                check(command, pytestconfig, monkeypatch)
            except (Exception, SystemExit) as error:
                return f"{error} {capsys.readouterr().err}"
        return ""

    return ask


@pytest.mark.parametrize("words", BY_WORDS, ids=" ".join)
def test_a_command_parses(words: tuple[str, ...], complaint: Callable[[Command], str]) -> None:
    assert not complaint(BY_WORDS[words])


@pytest.mark.parametrize("words", MENTIONED, ids=" ".join)
def test_a_command_in_the_text_has_its_flags(
    words: tuple[str, ...], complaint: Callable[[Command], str]
) -> None:
    """Text may leave out required flags, and use a word for a value."""
    assert not UNKNOWN.search(complaint(MENTIONED[words]))


@pytest.mark.parametrize(
    "line",
    [
        "python -m llama_torch.train --dims 8",
        "python -m llama_torch.generate --ckpt DIR --prompts a",
        "python -m llama_torch.nothing",
        "python tools/compare.py CKPT --again torch",
        "torchrun --nproc-per-node 8 -m llama_torch.train --data texts/ --fdsp 4",
        "pytest parity_tests/ --backends mine:Mine",
        "pytest parity_tests/test_nothing.py",
        "pytest parity_tests/ --hypothesis-profile slow",
        "pip install -e '.[nothing]'",
        "llama-parity tests my_llama:Port",
        "llama-parity test my_llama:Port --xfail-file FILE",
        "llama-parity test my_llama:Port --profile slow",
        "llama-parity compare CKPT --again torch",
        "llama-parity vectors make FOLDER",
        "unknown_program --help",
    ],
)
def test_a_command_that_is_wrong_would_be_seen(
    line: str, complaint: Callable[[Command], str]
) -> None:
    [block] = blocks("page.md", f"```sh\n{line}\n```\n")
    [command] = commands(block)
    assert UNKNOWN.search(complaint(command))


def test_a_command_without_what_it_requires_would_be_seen(
    complaint: Callable[[Command], str],
) -> None:
    assert "required" in complaint(Command("page.md:1", ("python", "tools/convert.py", "DIR")))


def test_commands_are_found_wherever_they_stand() -> None:
    text = "```sh name\nA=1 one --a 'b c' \\\n  d && two  # three\n```\n\n```\n$ four\nfive\n```\n"
    found = [command.words for block in blocks("p", text) for command in commands(block)]
    assert found == [("one", "--a", "b c", "d"), ("two",), ("four",)]


def test_a_workflow_s_commands_are_found() -> None:
    steps = "    steps:\n      - uses: a\n      - run: one --a\n      - name: b\n        run: >-\n"
    text = f"```yaml\n{steps}          two b\n          --c\n      - uses: d\n```\n"
    found = [command.words for block in blocks("p", text) for command in commands(block)]
    assert found == [("one", "--a"), ("two", "b", "--c")]


def test_commands_are_looked_for() -> None:
    assert len(BY_WORDS) > 30
    assert len(MENTIONED) > 10
