"""Layers that the models are made of: a weight or a table, and what it does to flat tokens. No attention, no architecture."""
