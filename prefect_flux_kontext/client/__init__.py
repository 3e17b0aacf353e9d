"""The service: client, transport, responses, polling and the account limits."""
