"""Plots and measures of a model's weights, and of its response to an image; trains nothing."""
