"""Data sets: sources, examples, batches."""
