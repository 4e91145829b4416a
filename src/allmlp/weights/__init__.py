"""Weights files to models and back."""
