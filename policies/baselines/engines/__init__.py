"""Rules of other engines, each as of a named version."""
