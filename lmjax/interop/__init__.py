"""Hugging Face directories in and out, one file per system."""
