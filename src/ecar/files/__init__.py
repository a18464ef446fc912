"""Files: images, tensors, JSON records, locks, the Hub."""
