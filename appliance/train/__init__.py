"""Training: recipes, the worker process, one module per method, checkpoints, events."""
