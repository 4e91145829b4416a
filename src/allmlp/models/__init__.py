"""Architectures: nn.Modules and their shapes; no files, no data, no training."""
