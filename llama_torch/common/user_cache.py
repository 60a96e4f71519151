"""The user's folder for what can be computed again."""

import os
from pathlib import Path


def user_cache() -> Path:
    """Return the folder for what is kept from one process to the next; it may not exist yet.

    Raises OSError where the user has no home: a number without a name, as containers have.
    """
    home = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(home):  # is to be ignored, and would be another one in each folder
        try:
            home = str(Path.home() / ".cache")
        except RuntimeError as error:
            raise FileNotFoundError(f"{error}") from None
    return Path(home) / "llama_torch"
