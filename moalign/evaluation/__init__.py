"""The evaluation that all methods share: answers, scores, indicators, KL to base."""
