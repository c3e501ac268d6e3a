"""The client side of one process: decodes tasks, runs clients, encodes updates; the doctor that examines a client."""
