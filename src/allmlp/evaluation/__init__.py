"""Evaluation: a model and data to metrics, without training."""
