"""Unlearn: make a model lose what it knows, and find out by attacks whether it has."""
