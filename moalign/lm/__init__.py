"""Everything between text and a language model."""
