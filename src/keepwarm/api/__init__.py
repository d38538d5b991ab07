"""The door: what it lets in, and a request read once, in chat's terms. Decisions only, no I/O."""
