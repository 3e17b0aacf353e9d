"""The durable record of every paid attempt, stored beside the output."""
