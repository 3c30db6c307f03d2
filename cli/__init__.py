"""The command line: one short file per verb, each of which parses, calls one verb of the library, and renders.

Top-level imports stay at floor 0 and Typer, so that help and lists answer at once.
"""
