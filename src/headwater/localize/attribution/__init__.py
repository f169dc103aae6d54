"""Scores from gradients: nodes and edges, at their own activations or averaged on the way to the counterfactual."""
