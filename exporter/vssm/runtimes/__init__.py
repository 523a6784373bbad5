"""What runs an exported file: arrays in, arrays out, no torch."""
