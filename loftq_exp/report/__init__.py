"""Reports of a run or sweep: metrics.json, a table, plots and TensorBoard."""
