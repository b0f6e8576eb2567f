"""`carousel top`: the live batch of a running server on a terminal."""
