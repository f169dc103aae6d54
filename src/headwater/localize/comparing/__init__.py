"""Circuits and components against each other: overlap, reuse, roles, interference, and what a subspace patch shows."""
