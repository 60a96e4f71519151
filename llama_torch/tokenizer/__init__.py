"""Tokenizers, chat templates, and text that comes token by token."""
