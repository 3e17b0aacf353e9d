"""What was paid for and what came of it, beside the output, outliving every process."""
