"""Passes through a model that a user wrote; it knows no kernel."""
