"""How fast lmjax is, beside whatever else is installed; `python -m experiments.benchmark`."""
