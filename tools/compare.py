"""Compare an implementation with the NumPy oracle: ``python tools/compare.py CKPT``.

The command is llama_parity/compare.py; installed, it is ``llama-parity compare``.
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
    sys.path.append("")  # for --against package.module:object

from llama_parity.compare import main

__all__ = ["main"]

if __name__ == "__main__":
    # SystemExit, so that SIGTERM too removes what is half-written.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
