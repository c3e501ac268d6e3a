"""What travels between server and clients, and what it weighs: messages, ledger, broadcast, virtual clock."""
