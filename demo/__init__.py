"""The demo: a small real model, and a run that shows what continuous batching does with it."""
