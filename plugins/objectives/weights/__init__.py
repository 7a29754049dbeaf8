"""What a sample's error is worth (`objective/weight=`)."""
