"""The HTML gallery of an output."""
