"""What stands beside the gateway: it starts clients and says how a machine is best used."""
