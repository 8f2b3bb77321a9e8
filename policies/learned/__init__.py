"""Policies that learn, from MLP16 and from observed acceptances."""
