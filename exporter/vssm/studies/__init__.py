"""Comparisons and pictures of pruned models on data."""
