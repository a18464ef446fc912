"""Run machinery that knows no stages: checkpoints, logs, processes, signals."""
