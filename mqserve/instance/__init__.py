"""Starts, keeps and ends an instance: its lease, its controller, its first node."""
