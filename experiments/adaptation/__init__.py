"""Whether learning pays: a policy against its own frozen copy."""
