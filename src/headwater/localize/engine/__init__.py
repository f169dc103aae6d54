"""Many runs of one model at the least cost: what passes see, how circuits and patches run, what that takes."""
