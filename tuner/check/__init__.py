"""`tuner check`: everything that can be known before the first step of a run."""
