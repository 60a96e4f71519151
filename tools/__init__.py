"""Command-line tools: compare.py, bench.py, plot.py; and what compare.py is made of."""
