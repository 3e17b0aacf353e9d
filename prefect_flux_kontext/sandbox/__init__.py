"""The Flux Kontext API, emulated on loopback: for rehearsals of whole batches at $0.

Start it with `flux-kontext sandbox`, inside a test with `server.running_sandbox()`, or mount the
`app` of an `app.Sandbox`. It shares no code with the client side of this package, so that neither
hides mistakes of the other.
"""
