"""What decides whether a model is safe and grounded, and acting on it: heads that refuse, heads that copy from the
context against MLPs that recall, what the model knows of itself that it knows."""
