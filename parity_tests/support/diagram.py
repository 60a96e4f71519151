"""Draw the packages and the allowed imports as Mermaid text, into docs/architecture.md.

``python -m parity_tests.support.diagram`` writes the blocks again after import_table.py changed.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from .import_table import ALLOWED, LIBRARY

PAGE = Path(__file__).parent.parent.parent / "docs/architecture.md"
# Packages that nearly all of their group import; a sentence says so in place of the arrows.
EVERYWHERE = ("llama_common", "llama_torch.common")
VERIFYING = "llama_torch --verify-every"  # the box of the modules that import the oracle
VERIFIERS = (
    *("llama_torch.training.verify", "llama_torch.training.error_bounds"),
    *("llama_torch.training.oracle", "llama_torch.training.float8_check"),
)


def whole() -> str:
    """Return a flowchart of the top packages.

    llama_torch's modules that import the oracle are a box of their own, to which the arrows of
    packages that import llama_torch are left out.
    """
    arrows = {
        (_group(part), _group(other)) for part, allowed in ALLOWED.items() for other in allowed
    }
    return _drawn(
        [
            (start, end)
            for start, end in sorted(arrows)
            if start != end and (end != VERIFYING or start == "llama_torch")
        ]
    )


def _group(part: str) -> str:
    """Return the box of a part in the flowchart of the top packages."""
    if part in VERIFIERS:
        return VERIFYING
    if part.startswith("parity_tests") and part != "parity_tests.conformance":
        return "parity_tests"
    return part if part == "parity_tests.conformance" else part.partition(".")[0]


def inside() -> str:
    """Return a flowchart of llama_torch's packages; "library" is the frame around most of them."""
    library = [part for part in LIBRARY if part not in EVERYWHERE]
    arrows: list[tuple[str, str]] = []
    for part, allowed in ALLOWED.items():
        if not part.startswith("llama_torch") or part in (*VERIFIERS, "llama_torch.data.__main__"):
            continue
        others = [other for other in allowed if other not in (*EVERYWHERE, *VERIFIERS)]
        if set(library) <= set(others):
            arrows.append((_short(part), "library"))
            others = [other for other in others if other not in library]
        arrows += [(_short(part), _short(other)) for other in others]
    return _drawn(sorted(arrows), {"library": [_short(part) for part in library]})


def _short(part: str) -> str:
    return part.removeprefix("llama_torch.") if part != "llama_torch" else "commands"


def _drawn(arrows: Sequence[tuple[str, str]], frames: Mapping[str, Sequence[str]] = {}) -> str:
    """Return a Mermaid flowchart of arrows; ``frames`` are boxes around some of them."""
    framed = [name for names in frames.values() for name in names]
    ends = dict.fromkeys(end for arrow in arrows for end in arrow)
    names = [name for name in ends if name not in (*frames, *framed)]
    lines = ["flowchart TD", *(f"  {_box(name)}" for name in names)]
    for frame, inner in frames.items():
        lines += [f"  subgraph {frame}", *(f"    {_box(name)}" for name in inner), "  end"]
    return "\n".join([*lines, *(f"  {_id(start)} --> {_id(end)}" for start, end in arrows)])


def _box(name: str) -> str:
    return f'{_id(name)}["{name}"]'


def _id(name: str) -> str:
    return name.replace(".", "_").replace(" --", "_").replace("-", "_")


DRAWINGS = {"whole": whole, "inside": inside}


def redrawn(text: str) -> str:
    """Return a page's text with its marked blocks drawn again; ValueError where one is missing."""
    for name, draw in DRAWINGS.items():
        opening = f"<!-- drawn: {name} -->\n```mermaid\n"
        before, found, after = text.partition(opening)
        if not found:
            raise ValueError(f"no block is marked <!-- drawn: {name} -->")
        text = f"{before}{opening}{draw()}\n```\n{after.partition('```' + chr(10))[2]}"
    return text


def main() -> int:
    """Write the drawings into the page."""
    PAGE.write_text(redrawn(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
