"""Bytes -> batches: sources of images, the decoder, transforms and the loader."""
