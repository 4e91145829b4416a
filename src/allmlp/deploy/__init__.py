"""Prediction, export and serving."""
