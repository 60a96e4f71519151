"""The command ``llama_torch.export`` by its former name, ``python -m llama_torch.gather``."""

import sys

from .export import main

if __name__ == "__main__":
    sys.exit(main())
