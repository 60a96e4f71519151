"""The suite's pytest plug-ins: backends, examples, expectations, reports, threads and memory."""

# One that imports another stands after it: pytest wants to import each itself.
PLUGINS = (
    "parity_tests.plugins.cores",  # the whole suite shared among processes
    "parity_tests.plugins.backend_option",  # --backend, --mutants
    "parity_tests.plugins.examples",  # --hypothesis-profile, --reproduce
    "parity_tests.plugins.expectations",  # --check, --xfails-file, --skips-file
    "parity_tests.plugins.parity_report",  # what was compared, and the last lines
    "parity_tests.plugins.failure_report",  # what failed, on which example, in ten lines
    "parity_tests.plugins.run_report",  # --report: all of it in one JSON file
    "parity_tests.plugins.process_state",  # --poison, threads, what a test must not leave behind
)
