"""Memory that compiled kernels work in."""

from __future__ import annotations

import torch

ALIGNMENT = 64  # bytes, of the widest vector


class Memory:
    """Memory for the kernels, kept from call to call and grown where more is asked for."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def at_least(self, size: int) -> int:
        """The address of so many bytes, on a vector's boundary."""
        if len(self._bytes) < size + ALIGNMENT:
            self._bytes = torch.empty(size + ALIGNMENT, dtype=torch.uint8)
        return -(-self._bytes.data_ptr() // ALIGNMENT) * ALIGNMENT
