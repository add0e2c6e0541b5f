"""Losses over fixed windows, and scores of multiple-choice tasks."""
