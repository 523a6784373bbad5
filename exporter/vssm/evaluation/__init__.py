"""Top-1 and top-5 of an export over a folder of images."""
