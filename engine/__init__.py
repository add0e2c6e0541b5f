"""What the commands stand on, one subject per file. Nothing here imports train.py or model.py."""

__version__ = '0.9.0'
