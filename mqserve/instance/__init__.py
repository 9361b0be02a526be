"""Starting, keeping and ending an instance: its lease, its controller, its first node."""
