"""A folder of pictures becomes a model and a report: what ``ecar fit`` does."""
