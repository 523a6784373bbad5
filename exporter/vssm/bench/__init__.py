"""How fast an export is: one figure each for runtimes, operators and thread counts."""
