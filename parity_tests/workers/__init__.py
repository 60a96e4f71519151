"""Programs that tests run in subprocesses: trainers to be killed, and processes of one job."""
