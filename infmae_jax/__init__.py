"""infmae-jax: self-supervised pretraining on infrared images with JAX and Flax."""

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str):
    """Imports `load` on first use, so that commands that do not need it start quickly."""
    if name == "load":
        from infmae_jax.interop.load import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
