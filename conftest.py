"""Names the suite's plug-ins; none imports torch unless the tests that run do."""

import os

# Before NumPy is imported: as many threads as torch gets (plugins/process_state.py says why).
os.environ.setdefault("OPENBLAS_NUM_THREADS", os.environ.get("PARITY_THREADS", "1"))

from parity_tests.plugins import PLUGINS

# In the repository's root, so that pytest knows the options in every folder of it.
pytest_plugins = list(PLUGINS)
