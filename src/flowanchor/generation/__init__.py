"""Who draws: a generator asks a network for a request, and gives images."""
