"""From the user's pictures to batches."""
