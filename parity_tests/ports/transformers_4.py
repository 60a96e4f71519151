"""transformers 4's LlamaForCausalLM with each of its attentions, and from_pretrained.

Tested with transformers 4.57.6, the last of version 4, and torch 2.13.0
(``pip install transformers==4.57.6 torch==2.13.0``); transformers_5.py has the code.
"""

from .transformers_5 import Directory, Eager, Flex, Sdpa

__all__ = ["Directory", "Eager", "Flex", "Sdpa"]

REQUIRES = ("transformers==4.57.6", "torch==2.13.0")
OBJECTS = ("Eager", "Sdpa", "Flex", "Directory")
MINUTES = 15.0
