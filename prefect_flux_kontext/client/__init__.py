"""The service client: transport, replies, polling, retries and account limits."""
