"""Evaluating and training models on data sets."""
