"""Losses: pure functions, tensors in and tensors out."""
