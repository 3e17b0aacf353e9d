"""Files on any fsspec filesystem, safe file names, and temporary databases."""
