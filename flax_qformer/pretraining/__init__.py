"""Training: the data, and later the stage-1 model, its losses and the loop."""
