"""One judge for all methods: answers, scores, indicators, distance from the base."""
