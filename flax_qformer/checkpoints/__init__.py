"""A model on disk and on the hub."""
