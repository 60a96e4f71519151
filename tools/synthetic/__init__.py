"""Conversations and pairs of answers about tasks whose right answers are known."""
