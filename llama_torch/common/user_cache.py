"""The user's folder for what can be computed again."""

import os
from pathlib import Path


def user_cache() -> Path:
    """Return the folder for what is kept from one process to the next; it may not exist yet."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "llama_torch"
