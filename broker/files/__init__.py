"""A user's files on their way to replicas: which folder a module belongs to, what of it travels, and how it arrives."""
