"""One table for each family: PyTorch's names, parameter paths, and how the axes move."""
