"""Workloads, the simulator and the measurements. On top of everything: nothing else of ours imports it."""
