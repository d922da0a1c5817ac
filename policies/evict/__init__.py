"""Evictors: which tokens stay, for good."""
