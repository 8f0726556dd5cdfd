"""From an initialised checkpoint to a fine-tuned adapter and its scores."""
