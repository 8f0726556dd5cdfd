"""What a run says: progress while it works, then metrics.json, a table, plots and TensorBoard."""
