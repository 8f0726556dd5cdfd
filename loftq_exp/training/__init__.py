"""Fine-tuning: from an initialised checkpoint to a trained adapter."""
