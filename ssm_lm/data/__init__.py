"""Text to tokens to batches: corpora, tokenizers, memory-mapped token streams, samplers whose order is reproducible."""
