"""Losses, one a file: what a student is taught. The file's stem is its public name."""
