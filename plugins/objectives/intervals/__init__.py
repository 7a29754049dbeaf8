"""Which times tell the network what it is asked (`objective/interval=`)."""
