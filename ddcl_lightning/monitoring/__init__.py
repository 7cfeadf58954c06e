"""Watching a codebook: recording what passes through it, signals of its health, their history and plots."""
