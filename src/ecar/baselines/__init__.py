"""Systems to compare with, trained and sampled by the same code."""
