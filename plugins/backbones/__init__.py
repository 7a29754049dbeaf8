"""Velocity networks (`backbone=`), each a chain of stages (`flowanchor.interfaces.Backbone`)."""
