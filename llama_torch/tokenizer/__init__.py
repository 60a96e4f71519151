"""Tokenizers, chat templates, and the incremental detokenizer."""
