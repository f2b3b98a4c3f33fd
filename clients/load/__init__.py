"""Load on an endpoint: many users at once, and what each of them waits."""
