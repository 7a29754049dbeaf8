"""Terms that learn the jump (`objective/shortcut=`)."""
