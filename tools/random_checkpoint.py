"""Write a checkpoint of random weights: ``python tools/random_checkpoint.py DIR --shape tiny``.

The command is llama_parity/random_checkpoint.py; installed, it is
``python -m llama_parity.random_checkpoint``.
"""

import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    # Ctrl-C while modules are imported: see llama_common/interrupt.py. cli.run takes over.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # The folder of a script is on the path, where its parent should be.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from llama_parity.random_checkpoint import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
