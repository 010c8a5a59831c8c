"""Runs: record, atomic files, lock, checkpoints, environment and cost (see :mod:`moalign.runs.store`).

Nothing here imports torch or pandas until tensors or tables are written or read.
"""
