"""Tell a GGUF file from others, without NumPy: commands ask before they import anything slow."""

from pathlib import Path

from llama_common.files import require_readable
from llama_common.nearest import did_you_mean

MAGIC = b"GGUF"
OF_FILES = ("safetensors", "bin", "pth", "pt", "ckpt", "ggml", "json", "npz", "onnx", "zip", "tar")


def is_gguf(path: Path) -> bool:
    """Return whether a path names a GGUF file, by its ending or its first bytes."""
    if path.suffix.lower() == ".gguf":
        return not path.is_dir()
    if not path.is_file():
        return False
    require_readable(path)
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def names_file(path: Path) -> str:
    """Return why a new directory should not have such a name, a file's; "" where it may.

    A dot alone is none: directories have names such as Llama-3.2-1B.
    """
    ending = path.suffix[1:].lower()
    if ending.isalnum() and did_you_mean(ending, ["gguf"]):
        return f", as its name ends in .{ending}; did you mean .gguf?"
    return f", and .{ending} is a file's ending;" if ending in OF_FILES else ""
