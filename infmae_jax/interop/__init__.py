"""Trained models in and out: run folders, the published PyTorch format, safetensors, serialised StableHLO."""
