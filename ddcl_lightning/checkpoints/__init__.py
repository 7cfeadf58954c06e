"""Checkpoint files: written whole, read with care, and what they may name."""
