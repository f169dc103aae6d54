"""Compare: every action and every baseline on the same task and budget, over seeds, with a verdict."""
