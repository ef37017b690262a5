"""State dict in, state dict in a tool's own format out, with the files and metadata around it."""
