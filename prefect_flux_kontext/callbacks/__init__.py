"""Callbacks from the service: tokens, receiver, inbox and what they trigger."""
