"""The command line: each command asks, checks its options, and calls one function."""
