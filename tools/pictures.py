"""Draw pictures with matplotlib into files, the same bytes for the same data."""

from functools import partial
from pathlib import Path
from typing import Any

from llama_common.errors import InputError
from llama_common.files import atomic_write


def pyplot() -> Any:
    """Return matplotlib's pyplot, for files alone; InputError where it is not installed."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise InputError("drawing needs matplotlib; pip install 'llama-parity[plot]'") from None
    mpl.use("agg")
    mpl.rcParams["svg.hashsalt"] = "llama"  # ids do not vary from run to run
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, out: Path, dpi: int = 150) -> None:
    """Write a figure, .svg, .png or .pdf by its name, whole or not at all."""
    metadata = {"Date": None} if out.suffix == ".svg" else None
    # A link that the user names is followed.
    atomic_write(out.resolve(), partial(figure.savefig, dpi=dpi, metadata=metadata))
