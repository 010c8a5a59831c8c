"""An example plugin of moalign."""
