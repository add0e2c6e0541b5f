"""Documents to token files: what every data/NAME/prepare.py shares."""
