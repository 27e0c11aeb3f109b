"""The host side of infmae-jax: infrared image files to shards to batches. NumPy only, no JAX."""
