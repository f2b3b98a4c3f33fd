"""The HTTP server: OpenAI-compatible completions that learn, sessions, metrics."""
