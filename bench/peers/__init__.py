"""Carousel beside other servers that install from the package index, each in its own environment.

environments.py installs them, engines.py says how each is run, driven.py runs one and reads its result, run.py takes turns.
drivers/ holds the scripts that run inside the environments; they import nothing of ours.
"""
