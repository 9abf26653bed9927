"""Sparse-to-sparse training of diffusion models, swept on Ray."""

__version__ = "0.1.0"
