"""The gateway: HTTP in, planned slots, HTTP out."""
