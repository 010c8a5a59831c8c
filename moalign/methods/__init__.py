"""Alignment methods: one file each. See :mod:`moalign.methods.base` for the contract."""
