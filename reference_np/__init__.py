"""LLaMA 2 in pure NumPy: the specification that every other implementation is held to.

Read in this order: ops and model beside the paper, with config and naming at hand; then grad
and optim for the training step, sft, reward, reward_model, divergence and policy for fine-tuning
(with masked for what a mask leaves) and sampling for generation; tolerances for the error bounds,
with low_precision for the baseline they start from; the three files of mutants for the bugs that a
test must tell apart; checkpoint for the files; backend for the protocol of an implementation
under test, with shipped for those of this repository, importing for others, and refusals for
what one does not offer.
"""
