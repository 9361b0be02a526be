"""The state model, which every process reads: what is wanted, what is seen, and what routes and resources mean."""
