"""Result images: download, check, mark as AI-made and store."""
