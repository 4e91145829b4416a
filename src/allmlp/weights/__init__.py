"""Tensors on disk <-> models."""
