"""What every room stands on: files that are whole or not there, and being told to stop.

It imports nothing of flowanchor but its errors.
"""
