"""What the verbs do with one run: plan, train, find, answer, export."""
