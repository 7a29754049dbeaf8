"""What every room stands on: files that are whole or not there. It imports nothing of flowanchor but its errors."""
