"""Typed recipes and task cards: found, read with their lines, overridden, checked."""
