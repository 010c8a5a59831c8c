"""Tasks: prompts, scored responses, objectives, normaliser and base model behind one task card."""
