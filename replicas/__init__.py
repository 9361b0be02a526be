"""A replica: takes envelopes from its backend's queue, runs the user's code on them, and records the results."""
