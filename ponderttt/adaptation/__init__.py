"""When and how fast weights learn: actions, features, gates, the update rule, the ledger."""
