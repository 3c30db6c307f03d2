"""Methods, one a file: how a delta is made. The file's stem is its public name."""
