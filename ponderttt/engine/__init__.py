"""Continuous batching: sequences, scheduler, phases, and the fronts that callers use."""
