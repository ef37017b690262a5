"""What the command line does with adapter files and base folders: look, check, convert, merge, shrink."""
