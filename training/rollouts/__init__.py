"""Sessions that step together: what policies are trained and compared on."""
