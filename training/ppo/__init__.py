"""PID-Lagrangian PPO: learns how to act within a mean cost, in any vectorised environment.

It knows nothing of language models. Shape letters: T steps, N environments, F features, A actions,
K budgets, B rows.
"""
