"""Write pairs of answers for small runs of reward models."""

import json
from pathlib import Path
from typing import Any

STRENGTHS = "significantly better", "better", "slightly better", None


def sums(n: int = 24) -> list[dict[str, Any]]:
    """Return pairs of very unequal lengths; of each fourth the strength is not given."""
    found = []
    for i in range(1, n + 1):
        count = " ".join(map(str, range(1, i % 7 + 2)))
        pair = {"prompt": f"Count to {i % 7 + 1}", "chosen": count, "rejected": "No." + "." * i}
        strength = STRENGTHS[i % 4]
        found.append(pair | ({"strength": strength} if strength else {}) | {"safety": i % 3 == 0})
    return found


def write_pairs(path: Path, records: list[dict[str, Any]]) -> str:
    """Write the records as .jsonl; return the path."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)
