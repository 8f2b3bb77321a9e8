"""The main job: policies compared on real decoding."""
