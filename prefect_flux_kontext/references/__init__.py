"""Reference images: what they are, whether the service would take them, how it gets them."""
