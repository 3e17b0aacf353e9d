"""The durable record of what was paid for, stored beside the output."""
