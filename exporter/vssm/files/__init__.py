"""Files read and written whole: atomic writes, JSON, journals."""
