"""Codecs: samples of the network's space <-> pixels in [-1, 1]."""
