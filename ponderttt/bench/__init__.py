"""Benchmarks of the engine against its peers: `ponderttt bench engine`."""
