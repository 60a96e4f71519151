"""Hide packages whose wheels on PyPI want CUDA's libraries; import it before what looks for them.

transformers imports them where they are installed; beside a torch for processors they do not load.
"""

import sys

for _name in ("torchvision", "torchaudio", "torchcodec"):
    sys.modules[_name] = None  # type: ignore[assignment]
