"""How training times are drawn (`objective/time=`)."""
