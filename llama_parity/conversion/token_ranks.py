"""Read and write Llama 3's ``tokenizer.model``: the ranks of a byte-level BPE, in tiktoken's form.

Each line is one token: its bytes in base64, a space, and its rank, which is its id.
"""

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path

from llama_common.errors import InputError

MOST_DIGITS = 9  # of a rank


def read_ranks(path: Path) -> dict[bytes, int]:
    """Return the ranks of a file by the tokens' bytes, 0 to n - 1 without a gap.

    Raises InputError naming the file (and the line) for a line of another form, a token or rank
    that stands twice, a rank that is missing, and a single byte without one.
    """
    ranks: dict[bytes, int] = {}
    lines: dict[bytes | int, int] = {}  # where each token and each rank stands
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        token, rank = _parse(line, f"{path}: line {number}")
        for what, key in (("rank", rank), ("token", token)):
            if (first := lines.setdefault(key, number)) != number:
                raise InputError(
                    f"{path}: line {number}: the {what} {key!r} is that of line {first}, too; copy "
                    "the file again"
                )
        ranks[token] = rank
    if missing := [rank for rank in range(len(ranks)) if rank not in lines]:
        raise InputError(f"{path}: rank {missing[0]} is missing; copy the file again")
    if absent := [f"0x{byte:02x}" for byte in range(256) if bytes([byte]) not in ranks]:
        raise InputError(
            f"{path}: {len(absent)} single bytes have no rank ({absent[0]} is the first); copy the "
            "file again"
        )
    return ranks


def ranks_text(ranks: Mapping[bytes, int]) -> bytes:
    """Return the content of a file of ranks, in their order."""
    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    return b"".join(lines)


def _parse(line: bytes, place: str) -> tuple[bytes, int]:
    """Return a line's token and rank; InputError for any but the one spelling of each."""
    text, _, number = line.partition(b" ")
    try:
        token = base64.b64decode(text, validate=True)
    except binascii.Error:
        token = b""
    if not token or base64.b64encode(token) != text:
        raise InputError(
            f"{place}: {_shown(text)} is not a token in base64 (as in Llama 3's tokenizer.model); "
            "copy the file again"
        )
    if not number.isdigit() or len(number) > MOST_DIGITS or str(int(number)) != number.decode():
        raise InputError(f"{place}: {_shown(number)} is not a rank; copy the file again")
    return token, int(number)


def _shown(text: bytes) -> str:
    return ascii(text[:40].decode("latin-1"))
