"""Architectures: nn.Modules and their configurations. No files, no data, no training."""
