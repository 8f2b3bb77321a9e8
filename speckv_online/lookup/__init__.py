"""The text's own n-grams, and the gate between them and a draft model."""
