"""Reinforcement learning from human feedback (section 3.2.3): prompts, answers and their scores."""
