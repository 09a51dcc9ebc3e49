"""Fused ops in place of what they compute, before autograd: `fuse_graph`."""

from .rewrite import fuse_graph

__all__ = ["fuse_graph"]
