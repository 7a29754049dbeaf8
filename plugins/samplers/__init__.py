"""Samplers (`sampler=`): how images are drawn from a trained network."""
