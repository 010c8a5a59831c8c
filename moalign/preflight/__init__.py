"""What can be known before a run: its problems, its memory, its cost."""
