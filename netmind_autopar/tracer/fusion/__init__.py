"""Fused ops in place of what they compute, before autograd."""

from .rewrite import fuse_graph, fused_rows

__all__ = ["fuse_graph", "fused_rows"]
