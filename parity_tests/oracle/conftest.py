"""Without PyTorch the tests that compare with it are left out."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("torch") else ["*_in_torch.py"]
