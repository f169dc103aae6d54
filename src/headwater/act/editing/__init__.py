"""Editing weights: each method finds a small change of them, as an Action whose `edit` holds it. One file a method."""
