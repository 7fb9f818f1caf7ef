"""Adapters on a patched model: which there are, their files, combining, swapping and mixing them."""
