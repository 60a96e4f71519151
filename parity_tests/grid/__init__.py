"""The grid: the conformance suite on the public packages of parity_tests/ports, and its page.

``python -m parity_tests.grid run`` makes an environment for each package and runs the suite in it;
``python -m parity_tests.grid page`` writes docs/grid.md and docs/grid.html from the results.
"""
