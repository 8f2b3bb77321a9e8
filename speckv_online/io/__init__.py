"""Files: formats, run directories, manifests, prompts, records."""
