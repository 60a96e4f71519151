"""Public packages as backends of the conformance suite; each in an environment of its own."""
