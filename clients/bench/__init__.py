"""Benchmarks of a server: what a user gets from it."""
