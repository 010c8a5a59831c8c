"""Reward models: trained on preference pairs, combined, calibrated, and judged."""
