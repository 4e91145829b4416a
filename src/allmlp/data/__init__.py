"""From bytes to batches: image sources, decoder, transforms and loader."""
