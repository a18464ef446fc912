"""How good samples are: extractors, distances between feature sets, and the files they are read from."""
