"""The command ``llama_torch.prepare`` by its former name, ``python -m llama_torch.data``."""

import sys

from ..prepare import main

if __name__ == "__main__":
    sys.exit(main())
