"""Language models that moalign knows by name."""
