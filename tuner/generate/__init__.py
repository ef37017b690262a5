"""`tuner sample`: pictures from a base with any adapters. make.py is the story."""
