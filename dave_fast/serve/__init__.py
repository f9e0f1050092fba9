"""The server: explanations over HTTP, with deadlines, error bounds and maps that are refined as samples arrive.

scheduler   chooses the rows (request, sample) of the next micro-batch; without torch, threads or a clock
service     open requests; `workers`, threads with one device each, compute micro-batches, another thread makes maps
app         HTTP: routes, limits, formats; `server` runs it under uvicorn, with signals and draining
"""
