"""Clients' state between rounds, and memory shared by processes."""
