"""Trainable state to trained state: optimizer, sharding, the step, checkpoints, metrics and the loop."""
