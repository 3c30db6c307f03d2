"""First weights, one way a file: how a network starts from another one's. The file's stem is its public name."""
