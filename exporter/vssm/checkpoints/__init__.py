"""Weights from files of strangers, read without running anything in them."""
