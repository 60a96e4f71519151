"""LLaMA 2 in pure NumPy: the specification that every other implementation is held to.

Read in this order: config, naming, ops, model, checkpoint; then grad and optim
for the training step.
"""
