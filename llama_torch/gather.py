"""Former name of the command ``llama_torch.export``: ``python -m llama_torch.gather``."""

import sys

from .export import main

if __name__ == "__main__":
    sys.exit(main())
