"""Decoders, their checkpoints and tokenizers."""
