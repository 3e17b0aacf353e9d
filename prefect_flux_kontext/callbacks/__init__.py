"""Callbacks from the service: their tokens, the receiver, the inbox, and the waiting rows."""
