"""Pictures of what the batch and its KV cache did: steps go in, SVG or PNG comes out. No server, no file, no clock."""
