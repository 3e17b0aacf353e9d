"""Manifests: formats, columns, rows and output paths."""
