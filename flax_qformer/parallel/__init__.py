"""Several chips and several processes."""
