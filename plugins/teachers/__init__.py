"""Where the target velocity comes from (`teacher=`)."""
