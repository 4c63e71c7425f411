"""What a training step needs of a pod that is not there."""
