"""Say what to install where PyTorch is missing."""

import sys

NEEDED = "llama_torch needs PyTorch: pip install 'llama-parity[torch]'"


def refuse(is_command: bool) -> None:
    """Raise ImportError with one line; of a command, print it and end the process with code 2."""
    if is_command:
        print(f"error: {NEEDED}", file=sys.stderr)
        sys.exit(2)
    raise ImportError(NEEDED)
