"""How a request travels: the envelope, the queues that carry it, and the store that keeps its result."""
