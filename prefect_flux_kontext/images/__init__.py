"""Result images: download, check, label as AI-made and store."""
