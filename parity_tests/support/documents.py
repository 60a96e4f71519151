"""Parse the project's pages: fenced blocks, commands in them, links, and names in the text."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "docs/*.md")
FENCE = re.compile(r"^```(.*)$")
# The comment before a block: the folder to run it in, or the reason not to run it.
NOTE = re.compile(r"^<!-- (run in|not run): (.+) -->$")
# The operators between the commands of one line.
OPERATORS = ("&&", "||", ";", "|", "&")
INLINE_COMMAND = re.compile(r"^(python|pytest|torchrun|pip|llama-parity) \S")


class Block(NamedTuple):
    """One fenced block of a page."""

    page: str
    line: int  # of its first line of text
    language: str  # the fence's first word; "" if it has none
    text: str
    note: tuple[str, str]  # ("run in" | "not run", the rest); ("", "") without a comment

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


class Command(NamedTuple):
    """One command as its words."""

    place: str
    words: tuple[str, ...]


def pages(root: Path = ROOT) -> dict[str, str]:
    """Return the text of every page by its path."""
    paths = sorted(path for pattern in PAGES for path in root.glob(pattern))
    return {str(path.relative_to(root)): path.read_text(encoding="utf-8") for path in paths}


def blocks(page: str, text: str) -> Iterator[Block]:
    """Yield the fenced blocks of a page."""
    lines = iter(enumerate(text.splitlines(), 1))
    note = "", ""
    for number, line in lines:
        opening = FENCE.match(line)
        if opening:
            words = opening[1].split()
            inside = []
            for _, other in lines:
                if other == "```":
                    break
                inside.append(other)
            yield Block(page, number + 1, words[0] if words else "", "\n".join(inside), note)
        found = NOTE.match(line)
        note = (found[1], found[2]) if found else ("", "")


def commands(block: Block) -> Iterator[Command]:
    """Yield the commands of a shell block, and those after "$ " in a transcript."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.language == "":
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    elif block.language == "yaml":
        lines = _steps(lines)
    elif block.language != "sh":
        lines = []
    for line in lines:
        yield from split_commands(block.place, line)


def _steps(lines: list[str]) -> list[str]:
    """Return the commands of a workflow's steps; ``>-`` folds the deeper lines after it to one."""
    found, folded = [], False
    for line in lines:
        run = re.match(r"^ +(?:- )?run: (.+)$", line)
        if run:
            folded = run[1] == ">-"
            found.append("" if folded else run[1])
        elif folded and not re.match(r"^ {10}\S", line):
            folded = False
        elif folded:
            found[-1] += f" {line.strip()}"
    return found


def split_commands(place: str, line: str) -> Iterator[Command]:
    """Yield the commands of one line, without the variables set before them."""
    words: list[str] = []
    for word in [*shlex.split(line, comments=True), ";"]:
        if word not in OPERATORS:
            words.append(word)
            continue
        while words and re.match(r"^[A-Z_]+=", words[0]):
            words.pop(0)
        if words:
            yield Command(place, tuple(words))
        words = []


def prose(text: str) -> str:
    """Return a page's text with every line of a block emptied."""
    inside, kept = False, []
    for line in text.splitlines():
        kept.append("" if inside or FENCE.match(line) else line)
        inside ^= bool(FENCE.match(line))
    return "\n".join(kept)


def spans(text: str) -> list[str]:
    """Return the texts between backticks, outside blocks."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(text))]


def links(text: str) -> list[str]:
    """Return the targets of a page's links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(text))


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
