"""From traces to figures."""
