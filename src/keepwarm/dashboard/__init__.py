"""The page at /keepwarm/: one static file, a client of the public routes only."""
