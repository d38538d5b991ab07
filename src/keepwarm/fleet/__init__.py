"""Several nodes on Ray Serve, each of them Keepwarm itself. Importing this needs no Ray."""
