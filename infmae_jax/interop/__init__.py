"""Checkpoints in and out: the published PyTorch format, safetensors, serialised StableHLO."""
