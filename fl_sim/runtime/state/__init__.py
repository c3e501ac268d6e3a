"""What clients keep between rounds, and memory that processes share."""
