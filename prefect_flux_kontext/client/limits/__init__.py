"""Client-side account limits: requests per minute and concurrent tasks."""
