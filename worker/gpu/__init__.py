"""The worker's side on a GPU: steps are launched one after the other and not waited for; what they drew is fetched beside the
next ones. executor.py ties together state (columns by slot on the device), inputs (one step's numbers in one copy), graphs
(decode steps captured once, replayed with one launch) and streams (CUDA's, and a twin on the host for tests).
"""
