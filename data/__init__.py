"""Data sets, one folder each with a prepare.py, and the pieces that those scripts share."""
