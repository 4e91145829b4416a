"""A model -> predictions."""
