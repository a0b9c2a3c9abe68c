"""Sparse weight formats: how a pruned matrix is laid out for a kernel."""
