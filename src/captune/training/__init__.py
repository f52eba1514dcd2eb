"""Training: loaders, steps, schedule, resume state, runs on disk, and fit."""
