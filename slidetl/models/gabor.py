"""Gabor filters: waves in an envelope, as the first layer of a network trained on images has them."""

import math

import torch
from torch import Tensor


def gabor_filters(n_filters: int, size_px: int, orientations: int) -> Tensor:
    """Makes filters of mean 0 through all orientations, phases and wavelengths, in this order.

    Args:
        n_filters: how many; a shorter list is the beginning of a longer one with as many wavelengths.
        size_px: side of a filter, at least 3.
        orientations: number of directions within half a turn.

    Returns:
        ``[n_filters, size_px, size_px] float32``.
    """
    scales = math.ceil(n_filters / (2 * orientations))
    wavelengths = torch.linspace(2.5, max(2.5, float(size_px)), scales)
    axis = torch.arange(size_px) - (size_px - 1) / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    filters = []
    for index in range(n_filters):
        angle = math.pi * (index % orientations) / orientations
        phase = math.pi / 2 * (index // orientations % 2)
        wavelength = wavelengths[index // (2 * orientations)]
        along = x * math.cos(angle) + y * math.sin(angle)
        envelope = torch.exp(-(x**2 + y**2) / (2 * (wavelength / 2) ** 2))
        wave = envelope * torch.cos(2 * math.pi * along / wavelength + phase)
        filters.append(wave - wave.mean())
    return torch.stack(filters)
