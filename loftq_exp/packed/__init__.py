"""Backbones that stay packed: codes at their own number of bits, in files and in memory, and layers that compute with them."""
