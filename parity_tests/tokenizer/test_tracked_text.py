"""Tracked text: it is the string it is, and each character keeps who wrote it."""

from collections.abc import Callable
from typing import Any

import jinja2
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llama_common.errors import InputError
from llama_torch.tokenizer.tracked_text import (
    MESSAGE,
    TEMPLATE,
    UNKNOWN,
    Tracked,
    joined,
    origins_of,
    parse,
    placed,
    track,
    written,
)

# Upper-case letters are written by the template, lower-case ones by a message: a character's origin
# can be read off it. Blanks and signs are of either.
LETTERS = "ABCabc"
SIGNS = " \n\t<>|/"
characters = st.tuples(st.sampled_from(LETTERS + SIGNS), st.sampled_from([TEMPLATE, MESSAGE]))


def tracked(pairs: list[tuple[str, str]]) -> Tracked:
    text = "".join(c for c, _ in pairs)
    origins = (o if c in SIGNS else TEMPLATE if c.isupper() else MESSAGE for c, o in pairs)
    return Tracked(text, "".join(origins))


texts = st.lists(characters, max_size=12).map(tracked)
short = st.lists(characters, min_size=1, max_size=2).map(tracked)
counts = st.integers(-1, 3)

OPERATIONS: dict[str, Callable[[Any, Any, Any, int], Any]] = {
    "a + b": lambda a, b, c, n: a + b,
    "plain + a": lambda a, b, c, n: "" + a,
    "a * n": lambda a, b, c, n: a * n,
    "n * a": lambda a, b, c, n: n * a,
    "a[n]": lambda a, b, c, n: a[n : n + 1],
    "a[n:]": lambda a, b, c, n: a[n:],
    "a[::-1]": lambda a, b, c, n: a[::-1],
    "list": lambda a, b, c, n: list(a),
    "split": lambda a, b, c, n: a.split(c, n),
    "split at blanks": lambda a, b, c, n: a.split(None, n),
    "split()": lambda a, b, c, n: a.split(),
    "rsplit": lambda a, b, c, n: a.rsplit(c, n),
    "rsplit at blanks": lambda a, b, c, n: a.rsplit(None, n),
    "splitlines": lambda a, b, c, n: a.splitlines(),
    "splitlines(True)": lambda a, b, c, n: a.splitlines(True),
    "partition": lambda a, b, c, n: a.partition(c),
    "rpartition": lambda a, b, c, n: a.rpartition(c),
    "strip": lambda a, b, c, n: a.strip(),
    "strip(c)": lambda a, b, c, n: a.strip(c),
    "lstrip": lambda a, b, c, n: a.lstrip(),
    "rstrip": lambda a, b, c, n: a.rstrip(),
    "removeprefix": lambda a, b, c, n: a.removeprefix(c),
    "removesuffix": lambda a, b, c, n: a.removesuffix(c),
    "replace": lambda a, b, c, n: a.replace(c, b, n),
    "join": lambda a, b, c, n: b.join([a, c, a]),
    "str": lambda a, b, c, n: str(a),
}


def flat(found: Any) -> list[str]:
    return [found] if isinstance(found, str) else list(found)


@pytest.mark.parametrize("operation", OPERATIONS)
@given(a=texts, b=texts, c=short, n=counts)
def test_an_operation_is_the_strings_own_and_keeps_origins(
    operation: str, a: Tracked, b: Tracked, c: Tracked, n: int
) -> None:
    run = OPERATIONS[operation]
    plain = run(*(str.__str__(text) for text in (a, b, c)), n)
    found = run(a, b, c, n)
    assert found == plain
    for text in flat(found):
        assert len(origins_of(text)) == len(text)
        for character, origin in zip(str.__str__(text), origins_of(text), strict=True):
            if character in LETTERS:
                assert origin == (TEMPLATE if character.isupper() else MESSAGE)
        assert UNKNOWN not in origins_of(text)


@given(a=texts)
def test_blanks_keep_their_origins_where_they_stand(a: Tracked) -> None:
    assert origins_of(joined(a.split("|"), written("|"))) == "".join(
        TEMPLATE if c == "|" else o for c, o in zip(str.__str__(a), origins_of(a), strict=True)
    )
    assert origins_of(joined(a.splitlines(True))) == origins_of(a)
    before, sign, after = a.partition("<")
    assert origins_of(before + sign + after) == origins_of(a)
    assert origins_of(a[len(a) - len(a.lstrip()) :]) == origins_of(a.lstrip())


@pytest.mark.parametrize("change", ["upper", "lower", "title", "capitalize", "swapcase"])
@given(text=st.text(max_size=6))
@example("ß")
@example("ŉ")
def test_a_change_of_case_keeps_origins_or_forgets_them(change: str, text: str) -> None:
    found = getattr(Tracked(text, MESSAGE), change)()
    assert found == getattr(text, change)()
    assert set(origins_of(found)) <= {MESSAGE if len(found) == len(text) else UNKNOWN}


NOT_FOLLOWED = {
    "%": lambda text: "a%s" % text,  # noqa: UP031
    "center": lambda text: text.center(9),
    "f-string": lambda text: f"{text:>9}",
    "format": lambda text: "a{}".format(text),  # noqa: UP032
    "zfill": lambda text: text.zfill(9),
    "expandtabs": lambda text: text.expandtabs(),
}


@pytest.mark.parametrize("operation", NOT_FOLLOWED)
def test_what_is_not_followed_is_of_unknown_origin(operation: str) -> None:
    found = NOT_FOLLOWED[operation](Tracked("<x>\t", MESSAGE))
    assert set(origins_of(found)) == {UNKNOWN}


SPECIAL = {"<x>": 1, "<xy>": 2, "|": 3, "<x><x>": 4}


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([("<x>", TEMPLATE), ("a", MESSAGE)], [1, "a"]),
        ([("<x>", MESSAGE), ("<x>", TEMPLATE)], ["<x>", 1]),
        ([("<x", TEMPLATE), (">", MESSAGE)], ["<x>"]),
        ([("<x", TEMPLATE), ("", MESSAGE), (">", TEMPLATE)], [1]),
        ([("<x><x>a|", TEMPLATE)], [4, "a", 3]),
        ([("<xy>", TEMPLATE), ("|", MESSAGE), ("a", TEMPLATE)], [2, "|a"]),
        ([("<x", TEMPLATE), ("12", UNKNOWN), (">", TEMPLATE)], ["<x12>"]),
        ([], []),
    ],
)
def test_the_template_alone_places_special_tokens(
    pairs: list[tuple[str, str]], expected: list[str | int]
) -> None:
    assert placed(joined(Tracked(*pair) for pair in pairs), SPECIAL) == expected


@pytest.mark.parametrize("origins", ["t?t", "??t", "tt?", "m?m", "???"])
def test_a_special_token_of_unknown_origin_is_refused(origins: str) -> None:
    with pytest.raises(InputError, match=r"'<x>' of pieces"):
        placed(Tracked("<x>", origins), SPECIAL)


def render(source: str, **given_names: Any) -> Any:
    environment = ImmutableSandboxedEnvironment()
    track(environment)
    return environment.from_string(parse(environment, source)).render(**given_names)


@pytest.mark.parametrize(
    ("source", "expected", "origins"),
    [
        ("a{{ m }}b", "a<x>b", "tmmmt"),
        ("{{ 'a' + m ~ 'b' ~ 1 }}", "a<x>b1", "tmmmt?"),
        ("{{ [m, 'a'] | join('-') }}", "<x>-a", "mmmtt"),
        ("{{ ms | join('-', attribute='c') }}", "<x>-<x>", "mmmtmmm"),
        ("{{ m | trim }}{{ m | upper }}{{ m | string }}", "<x><X><x>", "m" * 9),
        ("{% set a %}q{{ m }}{% endset %}{{ a }}", "q<x>", "tmmm"),
        ("{% macro f(a) %}q{{ a }}{% endmacro %}{{ f(m) }}", "q<x>", "tmmm"),
        ("{% for c in m %}{{ c }}-{% endfor %}", "<-x->-", "mtmtmt"),
        ("{{ m.split('x')[0] + 'y' }}", "<y", "mt"),
        ("{{ m | replace('x', 'y') }}", "<y>", "mtm"),
        ("{{ (m ~ 'a')[-2:] | reverse | list | join }}", "a>", "tm"),
        ("{{ ms[0]['c'] | default('d') }}{{ none | default('d', true) }}", "<x>d", "mmmt"),
        ("{{ 'yes' if '<x>' in m and m == '<x>' and m is string else 'no' }}", "yes", "ttt"),
        ("{{ {'a': m} | tojson }}", '{"a": "\\u003cx\\u003e"}', "?" * 22),
        ("{{ 'a%s' % m }}", "a<x>", "????"),
        ("{% set ns = namespace(a='') %}{% set ns.a = ns.a ~ m %}{{ ns.a }}", "<x>", "mmm"),
        ("{{ m | length }}", "3", "?"),
        ("{{ ms | map(attribute='c') | first }}", "<x>", "mmm"),
        ("{{ ms | selectattr('c', 'equalto', '<x>') | list | length }}", "1", "?"),
    ],
)
def test_a_template_carries_origins_through(source: str, expected: str, origins: str) -> None:
    message = Tracked("<x>", MESSAGE)
    ms = [{"c": message}, {"c": message}][: 2 if "join" in source else 1]
    found = render(source, m=message, ms=ms)
    assert found == expected
    assert origins_of(found) == origins
    environment = ImmutableSandboxedEnvironment()
    plain = [{"c": "<x>"} for _ in ms]
    assert environment.from_string(source).render(m="<x>", ms=plain) == expected


@pytest.mark.parametrize(
    "source", ["{{ m._origins }}", "{{ m.split.__globals__ }}", "{{ m.__class__.__mro__ }}"]
)
def test_a_templates_sandbox_hides_how_text_is_tracked(source: str) -> None:
    try:
        found = render(source, m=Tracked("a", MESSAGE))
    except jinja2.exceptions.SecurityError:
        return
    assert found == ""
