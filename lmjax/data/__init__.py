"""From text and pictures to batches: sources, tokenizers, stores, deterministic batches."""
