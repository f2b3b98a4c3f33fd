"""Generation by a stock vLLM server, with our fast weights as its LoRA adapters."""
