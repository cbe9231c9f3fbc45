"""What may happen to a run besides its mathematics: checkpoints, logs, locks, signals, several processes."""
