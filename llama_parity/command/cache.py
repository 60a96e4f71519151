"""The folder for what a run keeps, apart from the current folder."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder for what pytest and Hypothesis keep from one run to the next."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "llama-parity"
