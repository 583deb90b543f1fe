"""Make the two small Gemma-4-shaped checkpoints that this repository carries."""
