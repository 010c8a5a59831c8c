"""Losses and what they are made of: pure functions, tensors in, tensors out."""
