"""The server: explanations on demand, by a deadline, refined while you watch.

scheduler   which rows (request, sample) go into the next micro-batch; no torch, no threads, no clock of its own
service     engines, each a thread that takes micro-batches; contributions gathered to maps and error estimates
app         HTTP: routes, limits, formats; `server` runs it under uvicorn, with signals and draining
"""
