"""What localizing costs: beside the bare passes, beside other code, and as models, prompts and pairs grow."""
