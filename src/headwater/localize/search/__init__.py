"""Circuits and routes found without scoring every edge by its gradient."""
