"""Files: tensors, JSON records, locks, the Hub."""
