"""An example of a policy outside the project."""
