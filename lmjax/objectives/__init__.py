"""How a stretch of tokens becomes a training example: NumPy in, NumPy out."""
