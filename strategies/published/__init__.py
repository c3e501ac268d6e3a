"""Published methods, both halves of each in one file: a client and a server for `[client]` and `[strategy]`."""
