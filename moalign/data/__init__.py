"""The data layer: record types, readers that stream, splits by hash, errors with file and line."""
