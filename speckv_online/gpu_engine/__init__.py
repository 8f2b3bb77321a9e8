"""Drafts and verifications of plain Llamas through CUDA graphs: one launch in place of hundreds."""
