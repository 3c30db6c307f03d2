"""Merges, one a file: how many task vectors become one. The file's stem is its public name."""
