"""Talking to the service."""
