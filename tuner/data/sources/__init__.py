"""Where samples come from: folders, sets of the Hub and of `datasets`, tars; all opened by `opening`."""
