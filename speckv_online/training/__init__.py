"""Fitting the priors that ship: MLP16, acceptance weights, gates."""
