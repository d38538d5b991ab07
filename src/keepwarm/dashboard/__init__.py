"""The pages at /keepwarm/: static files, clients of the public routes only."""
