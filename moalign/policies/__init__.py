"""Policies: how a preference reaches a language model."""
