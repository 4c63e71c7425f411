"""What a training step, or drawing, needs of a pod that is not there."""
