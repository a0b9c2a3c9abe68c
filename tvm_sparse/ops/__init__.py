"""Operators that carry weights: how each is recognised, and its dense reference."""
