"""Images and text to arrays."""
