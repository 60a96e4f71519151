"""Environment variables that tests set and their subprocesses inherit."""

POISONED = "PARITY_POISON"  # set where uninitialised memory holds NaN
