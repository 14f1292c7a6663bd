"""What a scan over the training set is: the problem, its state, tangents, and ranks."""
