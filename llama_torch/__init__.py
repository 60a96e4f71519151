"""LLaMA 2 in PyTorch: training and inference over standard layers.

Read in this order: config, model, cache, loss, step, optim, data, train, generate.
"""
