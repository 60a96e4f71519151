"""Faults to plant in the GPU's code, one change of the text each; kernel_mutants.py plants them."""

from .attention import ATTENTION
from .fault import Fault
from .graphs import GRAPHS
from .one_sequence import ONE_SEQUENCE
from .several_sequences import SEVERAL
from .training import TRAINING

FAULTS = (*ONE_SEQUENCE, *ATTENTION, *SEVERAL, *TRAINING, *GRAPHS)

__all__ = ["FAULTS", "Fault"]
