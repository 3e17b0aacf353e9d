"""Reference images: where they are, whether they are valid, how the service gets them."""
