"""Kernels for Hopper GPUs, written in Mosaic GPU."""

from .common.module_names import name_by_kernel

name_by_kernel()
