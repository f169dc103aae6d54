"""Train: fine-tuning of all weights or of some, LoRA, and preference tuning. Each gives an Action with an Edit."""
