"""Named ways to restyle an image, and the templates that their prompts are."""
