"""A Flower app around fl-sim."""
