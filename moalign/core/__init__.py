"""What every other room may import: errors, records, preferences, seeds, schedules, progress, paths."""
