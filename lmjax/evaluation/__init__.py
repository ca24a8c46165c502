"""Measuring what models have learned, and showing it."""
