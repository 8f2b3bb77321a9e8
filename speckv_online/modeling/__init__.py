"""What decoding needs of models: caches, sampling, batches, and what a model is."""
