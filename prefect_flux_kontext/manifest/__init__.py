"""Reading manifests: formats, columns, rows and output paths."""
