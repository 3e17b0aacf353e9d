"""Named styles and their prompt templates."""
