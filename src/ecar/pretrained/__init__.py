"""Model folders, and networks built by kind."""
