"""A batch over many machines: cut into parts, which lease their share of the account."""
