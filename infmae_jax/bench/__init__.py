"""Measurements, one file per question; `python -m infmae_jax.bench SUBJECT` runs them. README.md has the results."""
