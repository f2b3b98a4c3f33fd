"""Training of policies: corpora, rollouts, PPO with a PID-controlled multiplier, ablations."""
