"""What train.py puts together: a start point, a plan, an optimizer, steps."""
