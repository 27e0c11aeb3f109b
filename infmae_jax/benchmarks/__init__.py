"""Measurements, one file a subject; `python -m infmae_jax.bench` runs them."""
