"""Being called by the service when a task ends: addresses, receiver, inbox, and what they wake."""
