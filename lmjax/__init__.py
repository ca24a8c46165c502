"""BERT to T5 to DALL-E in JAX. Importing this package imports nothing else, not even JAX.

`lmjax.load` (lmjax/loading.py) is imported when it is first used.
"""

__all__ = ["load"]


def __getattr__(name: str):
    if name == "load":
        from lmjax.loading import load

        return load
    raise AttributeError(f"module 'lmjax' has no attribute {name!r}")
