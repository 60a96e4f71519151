"""The table of allowed imports between the project's parts, and the imports of the sources."""

import ast
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

PACKAGES = ("reference_np", "llama_common", "llama_torch", "llama_parity", "tools", "parity_tests")

COMMON = ("llama_common", "llama_torch.common")
# The parts of llama_torch that are no command's.
LIBRARY = (
    "llama_common",
    *("llama_torch.common", "llama_torch.kernels", "llama_torch.model", "llama_torch.tokenizer"),
    *("llama_torch.config", "llama_torch.finetuning_config", "llama_torch.ppo_config"),
    *("llama_torch.data", "llama_torch.checkpoint"),
    *("llama_torch.distributed", "llama_torch.inference"),
)
PROGRAM = (
    *("llama_torch", *LIBRARY, "llama_torch.training", "llama_torch.rlhf"),
    *("llama_torch.training.verify", "llama_torch.training.error_bounds"),
    *("llama_torch.training.oracle", "llama_torch.training.float8_check"),
)
JUDGE = ("llama_parity", "llama_parity.comparison", "llama_parity.conversion")
PARTS_OF_TOOLS = ("tools.benchmarks", "tools.shapes", "tools.synthetic")
PARTS_OF_TESTS = (
    "parity_tests.plugins",
    *("parity_tests.backends", "parity_tests.conformance"),
    *("parity_tests.planted", "parity_tests.ports", "parity_tests.support"),
    *("parity_tests.workers", "parity_tests.gpu_faults", "parity_tests.vectors"),
)
# Part -> the parts that it may import beside itself. A module belongs to the longest name that
# its own begins with.
ALLOWED: Mapping[str, tuple[str, ...]] = {
    "reference_np": (),
    # What every other package but the oracle may import.
    "llama_common": (),
    # What every other package of llama_torch may import.
    "llama_torch.common": ("llama_common",),
    "llama_torch.kernels": (),
    "llama_torch.model": (*COMMON, "llama_torch.kernels"),
    "llama_torch.tokenizer": COMMON,
    "llama_torch.config": (*COMMON, "llama_torch.model"),
    "llama_torch.finetuning_config": ("llama_common", "llama_torch.config", "llama_torch.model"),
    "llama_torch.ppo_config": (
        *("llama_common", "llama_torch.config", "llama_torch.model"),
        "llama_torch.finetuning_config",
    ),
    "llama_torch.data": (*COMMON, "llama_torch.tokenizer", "llama_torch.config"),
    "llama_torch.checkpoint": (*COMMON, "llama_torch.model", "llama_torch.tokenizer"),
    "llama_torch.distributed": (*COMMON, "llama_torch.model", "llama_torch.config"),
    "llama_torch.inference": (
        *(*COMMON, "llama_torch.kernels", "llama_torch.model"),
        *("llama_torch.tokenizer", "llama_torch.checkpoint"),
    ),
    "llama_torch.training": (*LIBRARY, "llama_torch.training.verify"),
    # The only modules of llama_torch that import the oracle: --verify-every's.
    "llama_torch.training.verify": (
        *(*LIBRARY, "llama_torch.training", "llama_torch.training.error_bounds"),
        *("llama_torch.training.oracle", "llama_torch.training.float8_check", "reference_np"),
    ),
    "llama_torch.training.error_bounds": (
        *(*LIBRARY, "llama_torch.training", "llama_torch.training.oracle", "reference_np"),
    ),
    "llama_torch.training.float8_check": (
        *(*LIBRARY, "llama_torch.training", "llama_torch.training.error_bounds", "reference_np"),
    ),
    "llama_torch.training.oracle": (*LIBRARY, "llama_torch.training", "reference_np"),
    "llama_torch.rlhf": (*LIBRARY, "llama_torch.training"),
    # The commands, which nothing imports, and what outsiders import.
    "llama_torch": (*LIBRARY, "llama_torch.training", "llama_torch.rlhf"),
    "llama_torch.data.__main__": ("llama_torch", "llama_common"),
    # The commands compare and convert, and what they are made of.
    "llama_parity": ("llama_common", *JUDGE, *PROGRAM, "reference_np"),
    # The command llama-parity, which runs the suite as well.
    "llama_parity.command": (
        *("llama_common", *JUDGE, "reference_np", "parity_tests.conformance"),
        *("parity_tests.plugins", "parity_tests.vectors"),
    ),
    "llama_parity.__main__": ("llama_parity.command",),
    # conversion has the reader of GGUF files.
    "llama_parity.comparison": (*PROGRAM, "reference_np", "llama_parity.conversion"),
    "llama_parity.conversion": (*PROGRAM, "reference_np"),
    "tools": (*PROGRAM, "reference_np", "llama_parity", *PARTS_OF_TOOLS),
    "tools.benchmarks": (*PROGRAM, "reference_np", "llama_parity.conversion", "tools.shapes"),
    "tools.shapes": ("llama_torch.model",),
    "tools.synthetic": ("llama_common",),
    # The suite that outsiders run stands on the specification alone.
    "parity_tests.conformance": ("reference_np",),
    "parity_tests.backends": (*PROGRAM, "reference_np", "llama_parity.comparison"),
    "parity_tests.planted": ("reference_np", "parity_tests.conformance"),
    "parity_tests.vectors": ("reference_np", "llama_common", *JUDGE),
    # Each with the package that it is a port of, which is not installed here.
    "parity_tests.ports": (
        *("reference_np", "parity_tests.backends", "parity_tests.conformance"),
        *("llama_parity.comparison", "llama_parity.conversion"),
    ),
    "parity_tests.gpu_faults": (),
    # What pytest loads, for a port's own run too; poison.py knows PyTorch.
    "parity_tests.plugins": (
        *("reference_np", "llama_common", "parity_tests.conformance", "parity_tests.backends"),
    ),
    "parity_tests.support": (
        *(*PROGRAM, "reference_np", "parity_tests.conformance", "parity_tests.backends"),
        "parity_tests.plugins",
    ),
    "parity_tests.workers": (
        *(*PROGRAM, "reference_np", "parity_tests.conformance", "parity_tests.backends"),
        *("parity_tests.plugins", "parity_tests.support"),
    ),
    "parity_tests": (
        *(*PROGRAM, "reference_np", *JUDGE, "llama_parity.command", "tools"),
        *(*PARTS_OF_TOOLS, *PARTS_OF_TESTS),
    ),
}
# Part -> all the packages of others that it may import.
OTHERS: Mapping[str, frozenset[str]] = {
    "reference_np": frozenset({"numpy", "ml_dtypes", "safetensors"}),
    "parity_tests.conformance": frozenset(
        {"numpy", "ml_dtypes", "safetensors", "hypothesis", "pytest"}
    ),
}
# Package of others -> the modules' prefixes that alone may import it.
ONLY_IN: Mapping[str, tuple[str, ...]] = {
    "triton": (
        *("llama_torch.kernels", "llama_torch.inference.triton_step"),
        *("llama_torch.inference.triton_batch_step", "parity_tests"),
    ),
    "transformers": ("llama_parity", "tools", "parity_tests"),
}


class Import(NamedTuple):
    """One import of one module, anywhere in it."""

    importer: str
    imported: str  # a module of ours, or a package of others
    line: int


def sources(root: Path) -> dict[str, str]:
    """Return the source of every module of the packages under ``root``, by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = path.read_text(encoding="utf-8")
    return found


def imports(modules: Mapping[str, str]) -> list[Import]:
    """Return all imports of the sources, inside functions too, without the standard library's."""
    packages = {name.rpartition(".")[0] for name in modules}
    found = []
    for name, source in modules.items():
        package = name if name in packages else name.rpartition(".")[0]
        for line, names in _statements(source, package):
            targets = {_target(full, modules) for full in names}
            found += [Import(name, target, line) for target in sorted(targets)]
    return [one for one in found if one.imported not in sys.stdlib_module_names]


@cache  # the tests ask again for all sources beside one of theirs
def _statements(source: str, package: str) -> tuple[tuple[int, list[str]], ...]:
    """Return each import statement's line and its dotted names."""
    return tuple(
        (node.lineno, _named(node, package))
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
    )


def _named(node: ast.Import | ast.ImportFrom, package: str) -> list[str]:
    """Return the dotted names of an import statement of a module in ``package``."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        above = package.split(".")[: package.count(".") + 2 - node.level]
        base = ".".join([*above, *filter(None, [node.module])])
    return [f"{base}.{alias.name}" for alias in node.names]


def _target(full: str, modules: Mapping[str, str]) -> str:
    """Return our module that a dotted name is or is defined in, else the package of others."""
    if full.partition(".")[0] not in PACKAGES:
        return full.partition(".")[0]
    return full if full in modules else full.rpartition(".")[0]


def part_of(module: str, table: Mapping[str, object] = ALLOWED) -> str:
    """Return the part that a module belongs to; "" if the table has none."""
    names = [part for part in table if f"{module}.".startswith(f"{part}.")]
    return max(names, key=len, default="")


def violations(found: Iterable[Import]) -> list[str]:
    """Return a line for each import that the tables do not allow."""
    return [
        f"{importer}:{line} imports {imported}"
        for importer, imported, line in found
        if not _is_allowed(importer, imported)
    ]


def _is_allowed(importer: str, imported: str) -> bool:
    part = part_of(importer)
    if imported.partition(".")[0] in PACKAGES:
        return part_of(imported) in (part, *ALLOWED.get(part, ()))
    only = OTHERS.get(part_of(importer, OTHERS))
    places = ONLY_IN.get(imported)
    return (only is None or imported in only) and (
        places is None or any(f"{importer}.".startswith(f"{place}.") for place in places)
    )


def circles(arrows: Iterable[tuple[str, str]]) -> list[set[str]]:
    """Return the groups of two or more that import each other, directly or through others."""
    after: dict[str, set[str]] = {}
    for start, end in arrows:
        after.setdefault(start, set()).add(end)
        after.setdefault(end, set())

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for end in after[waiting.pop()] - seen:
                seen.add(end)
                waiting.append(end)
        return seen

    reach = {name: reached(name) for name in after}
    groups = {frozenset({n, *(m for m in reach[n] if n in reach[m])}) for n in after}
    return [set(group) for group in groups if len(group) > 1]
