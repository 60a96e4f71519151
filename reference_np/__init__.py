"""LLaMA 2 in pure NumPy: the specification that every other implementation is held to.

Read in this order: ops and model beside the paper, with config and naming at hand; then grad
and optim for the training step, tolerances for how close is close enough (plain is its baseline
in low precision), mutants and training_mutants for the bugs that must be seen, checkpoint for
the files.
"""
