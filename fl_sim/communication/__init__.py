"""Messages between server and clients, their bytes, and virtual time: payloads, ledger, sparse broadcast, clock."""
