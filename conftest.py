"""Names the suite's plug-ins; none imports torch unless the tests that run do."""

import os

# Before NumPy is imported: as many threads as torch gets (plugins/process_state.py says why).
os.environ.setdefault("OPENBLAS_NUM_THREADS", os.environ.get("PARITY_THREADS", "1"))

# In the repository's root, so that pytest knows the options in every folder of it.
# One that imports another stands after it: pytest wants to import each itself.
pytest_plugins = [
    "parity_tests.plugins.cores",  # the whole suite shared among processes
    "parity_tests.plugins.backend_option",  # --backend, --mutants
    "parity_tests.plugins.examples",  # --hypothesis-profile, --reproduce
    "parity_tests.plugins.failure_report",  # what failed, on which example, in ten lines
    "parity_tests.plugins.parity_report",  # what was compared, and the last lines
    "parity_tests.plugins.process_state",  # --poison, threads, what a test must not leave behind
]
