"""What a model costs: FLOPs, memory, time."""
