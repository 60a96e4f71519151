"""Mutate valid files: JSON values, bytes, TOML lines. All choices come from one ``Random``.

Hypothesis hands in a ``Random`` whose choices it records, shrinks and repeats.
"""

import json
import struct
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, NamedTuple

Mutate = Callable[[Random, bytes], bytes]

CONTROL = (
    "\x1b[31m\r\n\x00\x7f\u2028\u202e"  # colours, line breaks, a zero, text from right to left
)
OUTSIDE = "../outside/model.safetensors"  # a file that exists, in a folder that is not to be read
LONG, DEEP = 100_000, 3_000


class Raw(NamedTuple):
    """A JSON value by its spelling, for those that Python's encoder does not write."""

    text: str


class Pairs(NamedTuple):
    """A JSON object as pairs, since a key may stand twice."""

    items: list[tuple[str, Any]]


VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 255, 2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**63, -(2**63) - 1),
    *(0.5, -0.0, 1e-320, 1e300, Raw("1e400"), Raw("-1e400"), Raw("NaN"), Raw("Infinity")),
    *(Raw("1" + "0" * 400), Raw("9" * 5000), Raw("1.0"), "", " ", "x", "²", "1", "true", "nan"),
    *("\ud800", CONTROL, "x" * LONG, "\u00e9" * 300, OUTSIDE, "/dev/zero", "..", "a/../b", "a\0b"),
    *([], [0], [[]], [None], {}, {"": 0}, [0] * 1000, {"a": {"b": {"c": {}}}}),
    *(Raw("[" * DEEP + "]" * DEEP), Raw('{"a":' * DEEP + "0" + "}" * DEEP)),
)
LENGTHS = (0, 1, 7, 8, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
INSERTED = (
    b"\0",
    b"\xff",
    b"\xff" * 16,
    b"\0" * 64,
    b"\r",
    b'"',
    b"{",
    b"\x80",
    b"\xed\xa0\x80",
    b"\x1b[31m",
)
TOML_VALUES = (
    *("0", "-1", "2147483648", "9223372036854775808", "1" + "0" * 400, "1e400", "nan", "-inf"),
    *("0x7fffffff", "1_000", "1e-320", "true", "'text'", '""', f'"{"x" * LONG}"', '"a\\u0000b"'),
    *('"\\u001b[31m\\n\\u2028"', '"""two\nlines"""', "[]", "[[1], 'a']", "{a = 1}", "{}"),
    *("1979-05-27T07:32:00Z", "07:32:00", f'"{OUTSIDE}"', "[1, 2", "", "=", "[" * DEEP),
)


def mutated_json(random: Random, content: bytes) -> bytes:
    """Return a JSON text with one to three of its values or keys changed."""
    value = json.loads(content)
    for _ in range(random.randint(1, 3)):
        value = _changed(random, value, stay=0.05)
    return encoded(written(value))


def mutated_bytes(random: Random, content: bytes) -> bytes:
    """Return bytes with one to three changes: flipped, cut, inserted, repeated, other lengths."""
    for _ in range(random.randint(1, 3)):
        content = random.choice(BYTE_CHANGES)(random, content)
    return content


def mutated_safetensors(random: Random, content: bytes) -> bytes:
    """Return a safetensors file with another header, a header of another length, or other bytes."""
    if random.randrange(4) == 0:
        return mutated_bytes(random, content)
    (length,) = struct.unpack("<Q", content[:8])
    header = mutated_json(random, content[8 : 8 + length])
    said = random.choice([len(header)] * 8 + [random.choice(LENGTHS), length])
    return struct.pack("<Q", said) + header + content[8 + length :]


def mutated_toml(random: Random, content: bytes) -> bytes:
    """Return a TOML text with one to three lines changed, or with other bytes."""
    if random.randrange(4) == 0:
        return mutated_bytes(random, content)
    lines = content.decode().splitlines()
    for _ in range(random.randint(1, 3)):
        at = random.randrange(len(lines) + 1)
        line = "".join(lines[at : at + 1]) or "seed = 1"
        key, text = line.partition("=")[0].strip(), random.choice(TOML_VALUES)
        lines[at : at + 1] = random.choice(
            (
                *([], [line, line], [f"{key} = {text}"], [f"{key} = {text}"], [f"{key}x = 1"]),
                *([f"[{key}]", line], [f"[[{key}]]", line], [f"{key}.{key} = 1"]),
                [f"{_text(random)} = 1", line],
            )
        )
    return encoded("\n".join(lines))


def mutated_text(random: Random, content: bytes) -> bytes:
    """Return a text with a part removed, repeated or preceded by another, or with other bytes."""
    if random.randrange(4) == 0:
        return mutated_bytes(random, content)
    text = content.decode()
    at, end = sorted(random.randrange(len(text) + 1) for _ in range(2))
    part = random.choice(("", text[at:end] * 2, _text(random) + text[at:end]))
    return encoded(text[:at] + part + text[end:])


def mutated_lines(random: Random, content: bytes) -> bytes:
    """Return JSON Lines with one line changed, or with other bytes."""
    if random.randrange(4) == 0:
        return mutated_bytes(random, content)
    lines = content.splitlines()
    at = random.randrange(len(lines))
    line, other = lines[at], encoded(written(random.choice(VALUES)))
    lines[at] = random.choice((mutated_json(random, line), other, b"", line + line, line[:-1]))
    return b"\n".join(lines)


def encoded(text: str) -> bytes:
    """Return a text's bytes, those of half a character too."""
    return text.encode(errors="surrogatepass")


def written(value: Any) -> str:
    """Return a value as JSON, with the spellings of ``Raw`` and the repeated keys of ``Pairs``."""
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, dict):
        value = Pairs(list(value.items()))
    if isinstance(value, Pairs):
        pairs = (f"{json.dumps(key)}:{written(part)}" for key, part in value.items)
        return f"{{{','.join(pairs)}}}"
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    return json.dumps(value)


def _changed(random: Random, value: Any, stay: float = 0.3) -> Any:
    """Return a value with one change, in itself or in a part of it."""
    if isinstance(value, str) and random.randrange(4) and (inner := _parsed(value)):
        return written(_changed(random, inner))
    if isinstance(value, Pairs) or not value or not isinstance(value, dict | list):
        return _other(random, value)
    if random.random() < stay:
        return _other(random, value)
    if random.randrange(4) == 0:
        return _with_other_parts(random, value)
    at = random.choice(list(value)) if isinstance(value, dict) else random.randrange(len(value))
    copied = value.copy()
    copied[at] = _changed(random, value[at])
    return copied


def _parsed(text: str) -> Any:
    """Return the JSON object that a text is, as in a safetensors header; None for another text."""
    try:
        return json.loads(text) if text.startswith(("{", "[")) else None
    except (ValueError, RecursionError):
        return None


def _with_other_parts(random: Random, value: Any) -> Any:
    """Return an object or a list with a part removed, renamed, repeated, moved or added."""
    if isinstance(value, list):
        at, more = random.randrange(len(value)), random.choice(VALUES)
        kept = value[:at] + value[at + 1 :]
        return random.choice((kept, [*value, value[at]], [*value, more], value * 100, value[::-1]))
    pairs = list(value.items())
    at = random.randrange(len(pairs))
    (key, old), other = pairs[at], random.choice(pairs)
    renamed = random.choice((f"{key}x", key[:-1], _text(random), "", other[0]))
    pairs[at : at + 1] = random.choice(
        (
            *([], [(renamed, old)], [(key, old), (key, random.choice(VALUES))]),
            *([(key, old), (renamed, random.choice(VALUES))], [(key, other[1])]),
        )
    )
    is_once = len({key for key, _ in pairs}) == len(pairs)
    return dict(pairs) if is_once else Pairs(pairs)


def _other(random: Random, value: Any) -> Any:
    """Return another value in a value's place: one near it, or any."""
    near: list[Any] = []
    if type(value) in (int, float):
        near = [
            value + 1,
            value - 1,
            -value,
            2 * value,
            value * 1000,
            str(value),
            Raw(f"{value}.0"),
        ]
    if isinstance(value, str):
        near = [value[:-1], value + "x", value + _text(random), value.upper(), [value], value * 50]
    if near and random.randrange(2):
        return random.choice(near)
    return random.choice(VALUES)


def _text(random: Random) -> str:
    return random.choice([text for text in VALUES if isinstance(text, str)])


def _flip(random: Random, content: bytes) -> bytes:
    at = random.randrange(len(content) + 1)
    return (
        content[:at]
        + bytes(b ^ 1 << random.randrange(8) for b in content[at : at + 1])
        + (content[at + 1 :])
    )


def _cut(random: Random, content: bytes) -> bytes:
    return content[: random.randrange(len(content) + 1)]


def _remove(random: Random, content: bytes) -> bytes:
    at = random.randrange(len(content) + 1)
    return content[:at] + content[at + random.choice((1, 2, 8, 64)) :]


def _insert(random: Random, content: bytes) -> bytes:
    at, more = random.randrange(len(content) + 1), random.choice(INSERTED)
    return content[:at] + more + content[at:]


def _repeat(random: Random, content: bytes) -> bytes:
    at, n = random.randrange(len(content) + 1), random.choice((1, 4, 16, 256))
    return content[:at] + content[at : at + n] * random.choice((2, 3, 100)) + content[at + n :]


def _overwrite(random: Random, content: bytes) -> bytes:
    """Put an integer of one to eight bytes, as lengths are, over some."""
    at, width = random.randrange(len(content) + 1), random.choice((1, 2, 4, 8))
    number = random.choice((*LENGTHS, len(content))) & ((1 << 8 * width) - 1)
    return (
        content[:at]
        + number.to_bytes(width, random.choice(("little", "big")))
        + (content[at + width :])
    )


BYTE_CHANGES: Sequence[Mutate] = (_flip, _flip, _cut, _remove, _insert, _repeat, _overwrite)
