"""Client side: the one client with its slots, and presets that compose it."""
