"""What other libraries open trained networks with."""
