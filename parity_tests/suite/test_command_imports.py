"""No module imports a test; only tests and workers import a command, to run its ``main``."""

from functools import cache
from pathlib import Path

from ..support.import_table import Import, imports, sources

SOURCES = sources(Path(__file__).parent.parent.parent)
COMMANDS = [
    *(f"llama_torch.{name}" for name in ("train", "generate", "chat", "evaluate", "prepare")),
    *("llama_torch.export", "llama_torch.gather", "llama_torch.data.__main__", "llama_torch.gatt"),
    *(f"tools.{name}" for name in ("bench", "compare", "convert", "learning", "plot", "scaling")),
    *("tools.tasks", "tools.right_answers", "tools.instruction_turns", "tools.attention_plot"),
    "tools.chain",
    *("tools.random_checkpoint", "llama_parity.compare", "llama_parity.convert"),
    "llama_parity.command.main",
]
# Old names of commands, and the clone's commands of installed ones.
ALIASES = (
    *("llama_torch.gather", "llama_torch.data.__main__"),
    *("tools.compare", "tools.convert", "llama_parity.__main__"),
)
# What runs a command as a user does, and so may import one.
CALLERS = (
    "parity_tests.workers.",
    "parity_tests.support.survival",
    "parity_tests.support.trainer_runs",
    "parity_tests.training.conftest",
    "parity_tests.tools.conftest",
    "parity_tests.tools.commands",
    "parity_tests.false_alarms",
    "llama_parity.command",
)


@cache
def all_imports() -> list[Import]:
    """Return every import of the project; not at import, as it takes a second."""
    return imports(SOURCES)


def test_no_test_imports_another() -> None:
    assert len([name for name in SOURCES if is_test(name)]) > 40
    assert not imports_of_tests(all_imports())


def test_nothing_but_tests_and_workers_imports_a_command() -> None:
    """They call a command's ``main`` in their own process."""
    assert set(COMMANDS) <= set(SOURCES)
    assert not imports_of_commands(all_imports())


def test_an_import_of_a_test_or_a_command_would_be_seen() -> None:
    planted = {
        "parity_tests.tools.test_one": "from ..data.test_data import TEXT",
        "llama_torch.training.inner": "def f():\n    from ..train import main",
        "llama_parity.comparison.inner": "from .. import compare",
    }
    found = imports(SOURCES | planted)
    [of_test] = imports_of_tests(found)
    assert of_test.importer == "parity_tests.tools.test_one"
    of_commands = {one.importer for one in imports_of_commands(found)}
    assert of_commands == {"llama_torch.training.inner", "llama_parity.comparison.inner"}


def is_test(module: str) -> bool:
    return module.rpartition(".")[2].startswith("test_")


def imports_of_tests(found: list[Import]) -> list[Import]:
    return [one for one in found if is_test(one.imported)]


def imports_of_commands(found: list[Import]) -> list[Import]:
    return [
        one
        for one in found
        if one.imported in COMMANDS
        and not is_test(one.importer)
        and not one.importer.startswith(CALLERS)
        and one.importer not in ALIASES
    ]
