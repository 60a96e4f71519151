"""Text that remembers, character by character, whether a chat template or a message wrote it.

A template places special tokens; a message never does, whatever it spells. A template is a program
that cuts, joins and replaces text, so the origin of each character is carried through those
operations. What an operation returns that is not followed here is of unknown origin, and is refused
where it spells a special token.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, groupby
from typing import Any, SupportsIndex

import jinja2.filters
from jinja2 import Environment, nodes
from jinja2.visitor import NodeTransformer

from llama_common.errors import InputError

# ruff: noqa: D102  (the methods are those of str)

TEMPLATE, MESSAGE, UNKNOWN = "tm?"  # who wrote a character


class Tracked(str):
    """A string that has an origin for each of its characters."""

    __slots__ = ("_origins",)
    _origins: str

    def __new__(cls, text: object = "", origins: str = UNKNOWN) -> "Tracked":
        """Return text with its origins: one for each character, or one for all."""
        self = super().__new__(cls, text)
        self._origins = origins * len(self) if len(origins) == 1 else origins
        assert len(self._origins) == len(self)
        return self

    def __str__(self) -> str:
        return self  # jinja calls str() on all that it puts out

    def __add__(self, other: str) -> "Tracked":
        return joined((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> "Tracked":
        return joined((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, count: SupportsIndex) -> "Tracked":
        return Tracked(super().__mul__(count), self._origins * count.__index__())

    __rmul__ = __mul__

    def __getitem__(self, key: SupportsIndex | slice) -> "Tracked":
        return Tracked(super().__getitem__(key), self._origins[key])

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._divided(super().split(sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._divided(super().rsplit(sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[str]:
        lines, shown = super().splitlines(True), super().splitlines(keepends)
        pairs = zip(self._successive(lines), shown, strict=True)
        return [line[: len(kept)] for line, kept in pairs]

    def partition(self, sep: str) -> tuple[str, str, str]:
        before, found, after = self._successive(super().partition(sep))
        return before, found, after

    def rpartition(self, sep: str) -> tuple[str, str, str]:
        before, found, after = self._successive(super().rpartition(sep))
        return before, found, after

    def strip(self, chars: str | None = None) -> "Tracked":
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None) -> "Tracked":
        return self[len(self) - len(super().lstrip(chars)) :]

    def rstrip(self, chars: str | None = None) -> "Tracked":
        return self[: len(super().rstrip(chars))]

    def removeprefix(self, prefix: str) -> "Tracked":
        return self[len(self) - len(super().removeprefix(prefix)) :]

    def removesuffix(self, suffix: str) -> "Tracked":
        return self[: len(super().removesuffix(suffix))]

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> "Tracked":
        if not old:
            return Tracked(super().replace(old, new, count))
        return joined(self.split(old, count), new)

    def join(self, parts: Iterable[str]) -> "Tracked":
        return joined(parts, self)

    def upper(self) -> "Tracked":
        return self._mapped(super().upper())

    def lower(self) -> "Tracked":
        return self._mapped(super().lower())

    def capitalize(self) -> "Tracked":
        return self._mapped(super().capitalize())

    def title(self) -> "Tracked":
        return self._mapped(super().title())

    def swapcase(self) -> "Tracked":
        return self._mapped(super().swapcase())

    def _mapped(self, text: str) -> "Tracked":
        """Return this text after a change of case; no character's result is ever empty."""
        return Tracked(text, self._origins if len(text) == len(self) else UNKNOWN)

    def _successive(self, parts: Sequence[str]) -> list[str]:
        """Return parts that follow one another without a gap."""
        ends = list(accumulate(map(len, parts)))
        return [self[end - len(part) : end] for part, end in zip(parts, ends, strict=True)]

    def _divided(self, parts: Iterable[str], sep: str | None) -> list[str]:
        """Return parts between which ``sep`` stands, or blanks."""
        found: list[str] = []
        start = 0
        for part in parts:
            if sep is None:
                start = self.find(part, start)  # all before it is blank
            found.append(self[start : start + len(part)])
            start += len(part) + len(sep or "")
        return found


def origins_of(text: str) -> str:
    """Return the origin of each character of any string."""
    return text._origins if isinstance(text, Tracked) else UNKNOWN * len(text)


def joined(parts: Iterable[str], separator: str = "") -> Tracked:
    """Return strings put together, each with its origins."""
    between: list[str] = []
    for part in parts:
        between += [separator, part] if between else [part]
    return Tracked("".join(between), "".join(map(origins_of, between)))


def written(text: str) -> Tracked:
    """Return text that a template itself holds."""
    return Tracked(text, TEMPLATE)


def placed(
    text: str,
    special: Mapping[str, int],
    single_words: Collection[str] = (),
    normalized: Collection[str] = (),
    ordinary: Collection[str] = (),
) -> list[str | int]:
    """Return what a template wrote, in order: text, and the ids of the special tokens it placed.

    A special token is spelled by the template's own characters alone; the longest at a place is
    taken. One of ``single_words`` is text beside a letter or digit. Those that are ``normalized``
    are looked for where no other is, as the tokenizers library does it.
    Raises InputError where characters of unknown origin spell a part of one, unless it is one of
    ``ordinary``, which a message may spell.
    """
    _require_known(text, set(special) - set(ordinary))
    found: list[str | int] = [text] if text else []
    for names in (set(special) - set(normalized), set(special) & set(normalized)):
        ids = {name: special[name] for name in names}
        pieces = (_split(p, ids, single_words) if isinstance(p, str) else [p] for p in found)
        found = [piece for parts in pieces for piece in parts]
    return [str.__str__(piece) if isinstance(piece, str) else piece for piece in found]


def _split(text: str, ids: Mapping[str, int], single_words: Collection[str]) -> list[str | int]:
    """Return text and the ids of the special tokens that its template's characters spell."""
    if not ids:
        return [text]
    found: list[str | int] = []
    pattern = _alternatives(ids)
    done = start = 0
    for origin, characters in groupby(origins_of(text)):
        end = start + len(list(characters))
        matches = pattern.finditer(text, start, end) if origin == TEMPLATE else ()
        for match in matches:
            before, after = text[match.start() - 1 : match.start()], text[match.end() :][:1]
            if match[0] in single_words and re.search(r"\w", f"{before} {after}"):
                continue
            found += [text[done : match.start()], ids[match[0]]]
            done = match.end()
        start = end
    return [piece for piece in [*found, text[done:]] if piece != ""]  # 0 is an id


def _alternatives(names: Collection[str]) -> re.Pattern[str]:
    """Return the pattern of any of some names, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))


def _require_known(text: str, special: Collection[str]) -> None:
    origins = origins_of(text)
    if UNKNOWN not in origins or not special:
        return
    for match in re.finditer(f"(?=({_alternatives(special).pattern}))", text):
        if UNKNOWN in origins[match.start(1) : match.end(1)]:
            raise InputError(
                f"the template makes {match[1]!r} of pieces by an operation after which nobody can "
                "tell its own text from a message's; write the token out in the template"
            )


class TrackingNodes(NodeTransformer):
    """Rewrites a parsed template: its own strings are ``written``, and ``~`` is ``joined``."""

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:  # noqa: N802
        """Mark the text between the tags."""
        return _call("written", nodes.Const(node.data), node.lineno)

    def visit_Const(self, node: nodes.Const) -> nodes.Node:  # noqa: N802
        """Mark a string inside the tags."""
        if not isinstance(node.value, str):
            return node
        return _call("written", nodes.Const(node.value), node.lineno)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        """Join what ``~`` joins, after str() of each."""
        parts = nodes.List([self.visit(part) for part in node.nodes])
        return _call("joined", parts, node.lineno)


def _call(name: str, argument: nodes.Expr, line: int) -> nodes.Node:
    call = nodes.Call(nodes.EnvironmentAttribute(name), [argument], [], None, None)
    return call.set_lineno(line)


def track(environment: Environment) -> None:
    """Make an environment's templates keep the origins of text; parse them by ``parse``."""
    attributes: dict[str, Any] = {
        "concat": joined,
        "written": written,
        "joined": lambda parts: joined(map(str, parts)),
    }
    vars(environment).update(attributes)
    environment.filters["join"] = _join


def parse(environment: Environment, source: str) -> nodes.Template:
    """Return a template's nodes, rewritten to keep origins. Raises jinja2.TemplateError."""
    parsed: nodes.Template = TrackingNodes().visit(environment.parse(source))
    return parsed


@jinja2.pass_environment
def _join(
    environment: Environment,
    value: Iterable[Any],
    d: str = "",
    attribute: str | int | None = None,
) -> Tracked:
    """Do as jinja's own filter does, with origins."""
    if attribute is not None:
        value = map(jinja2.filters.make_attrgetter(environment, attribute), value)
    return joined(map(str, value), str(d))
