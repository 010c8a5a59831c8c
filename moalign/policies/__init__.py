"""Policies: a language model, its adapters, and how a preference reaches it."""
