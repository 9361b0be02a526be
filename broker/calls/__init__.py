"""Requests that this process sends: sending them, waiting for their results, cancelling them."""
