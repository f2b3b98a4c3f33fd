"""Per-session LoRA weights: layout, bank, optimiser, PEFT format."""
