"""The data layer: readers that stream, splits by hash, errors with file and line."""
