"""Environments for PPO: recorded traces, and the live engine."""
