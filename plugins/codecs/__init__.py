"""Codecs (`codec=`): samples of a network to pixels and back."""
