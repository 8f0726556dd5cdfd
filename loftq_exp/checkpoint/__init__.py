"""From a pre-trained checkpoint to an initialised one, one weight at a time."""
