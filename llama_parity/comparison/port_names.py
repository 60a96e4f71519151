"""Refuse the name of a port by which another module would be imported than is meant."""

from pathlib import Path

from llama_common.errors import InputError
from llama_common.hidden_modules import require_hides_none, require_hides_nothing
from reference_np.importing import file_of

from .python_source import naming_hint


def require_importable(spec: str, flag: str = "") -> None:
    """Raise InputError for a port's name of which other modules would be imported than meant.

    ``flag`` stands before the name on the command line.
    """
    who = f"{flag} {spec}".strip()
    if spec.endswith(".py"):
        if hint := naming_hint(spec, flag):
            raise InputError(hint)
        raise InputError(f"{who}: no such file; give FILE.py:OBJECT or MODULE:OBJECT")
    file = file_of(spec)
    if file is not None and file.is_file():
        require_hides_nothing(file, who)
        require_hides_none(file.parent)
    require_hides_none(Path.cwd())
