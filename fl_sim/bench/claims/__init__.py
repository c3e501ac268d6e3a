"""The claims court: published methods, the bytes that their papers claim, and the bytes that were encoded here."""
