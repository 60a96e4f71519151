"""Find the word that was meant, for one that is misspelt."""

from collections.abc import Iterable

LONGEST = 40  # letters; no word of ours is longer, and comparing takes their square in time


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " did you mean ...?" with the one or two known words nearest to ``word``, or ""."""
    from difflib import SequenceMatcher

    given = word.lower().strip("-")
    if len(given) > LONGEST:
        return ""
    likeness = {}
    for name in known:
        meant = name.lower().strip("-")
        ratio = SequenceMatcher(None, given, meant).ratio()
        likeness[name] = max(ratio, 0.9) if given and meant.startswith(given) else ratio
    best = max(likeness.values(), default=0.0)
    near = [name for name, ratio in likeness.items() if ratio >= max(0.7, best - 0.05)]
    if not near:  # a part of the name, as --layers of --n-layers, or letters of it in order
        near = [n for n in likeness if set(given.split("-")) <= set(n.strip("-").split("-"))]
        near = near or sorted((n for n in likeness if _shortens(n.strip("-"), given)), key=len)[-1:]
    near = sorted(near, key=lambda name: -likeness[name])[:2]
    return f" did you mean {' or '.join(near)}?" if near else ""


def _shortens(name: str, word: str) -> bool:
    """Return whether a name is an abbreviation of a word: lr of learning-rate."""
    rest = iter(word)
    return len(name) > 1 and name[:1] == word[:1] and all(letter in rest for letter in name)
