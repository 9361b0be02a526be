"""The state model, and what keeps the world like it: compare what is wanted with what is seen, start and stop processes."""
