"""The verbs: each maps artifacts to an artifact; none calls another."""
