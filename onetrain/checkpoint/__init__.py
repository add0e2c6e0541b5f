"""Checkpoints: written, verified, copied elsewhere, and continued from."""
