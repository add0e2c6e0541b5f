"""What a run writes about itself, to files and to the terminal."""
