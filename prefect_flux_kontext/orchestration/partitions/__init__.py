"""Batches that run in partitions on several workers."""
