"""The judge of Llamas: compare an implementation with the specification, and convert its files."""
