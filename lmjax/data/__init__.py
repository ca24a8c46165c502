"""From text to batches: sources, tokenizers, token stores, deterministic batches."""
