"""Kernels, each beside its plain reference. They know nothing of runs."""
