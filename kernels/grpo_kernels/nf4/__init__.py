"""Products with NF4 weights. See README.md in this folder."""
