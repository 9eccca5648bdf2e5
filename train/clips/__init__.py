"""Which clips a run trains on, and how their bytes reach the training step."""
