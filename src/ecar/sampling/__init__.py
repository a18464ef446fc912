"""Sampling: the stage loop and the public Pipeline around it."""
