"""Environment variables that tests set, and that the processes they start inherit."""

POISONED = "PARITY_POISON"  # set where uninitialised memory holds NaN
