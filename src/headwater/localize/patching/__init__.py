"""What really happens when a value, an edge or a state is put into another run."""
