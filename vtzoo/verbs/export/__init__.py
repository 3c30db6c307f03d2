"""Ways out: the same model for another runtime or file format."""
