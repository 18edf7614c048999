"""Products with NF4 weights. README.md in this folder has the drawings, and says which kernel serves what."""
