"""The state model that every process reads: the desired and the observed state, and what routes and resources mean."""
