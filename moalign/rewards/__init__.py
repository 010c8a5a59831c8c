"""The reward-scoring layer: text in, a matrix ``[samples, objectives]`` out. It never sums objectives."""
