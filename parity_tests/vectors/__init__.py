"""Golden vectors: small cases as files, for ports in any language (docs/vectors.md)."""
