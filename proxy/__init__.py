"""The HTTP server: a request becomes an envelope, and the result of its future becomes a response."""
