"""Processes, devices, and how parameters are laid out over them."""
