"""Clients of the server, over HTTP only: benchmarks, evaluation in a sandbox, load."""
