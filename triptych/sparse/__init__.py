"""Sparse voxel tensors and, built on them, sparse networks."""
