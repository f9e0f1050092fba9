"""The server: explanations over HTTP, with deadlines, error bounds and maps that are refined as samples arrive.

From a request to its maps:

scheduler   chooses the rows (request, sample) of the next micro-batch; without torch, threads or a clock
jobs        requests, jobs and the events that they send
workers     threads with one device each, which compute micro-batches
service     open requests, the workers, and a thread that makes maps
models      the models of a server

HTTP:

app         the ASGI app: routes, API keys, answers to errors
api         the functions of the routes below /v1
kserve      the routes below /v2
page/       the page at /
schemas     options and answers as pydantic models
formats     answers as JSON, events, pictures and arrays
uploads     bodies, and images stored for later requests
account     the memory that requests take
workshop    the processes that parse and decode what clients send, in two lanes
untrusted   what those processes do
middleware  limits of bodies, request ids, the access log
limits      all limits, with their defaults
prometheus  the metrics

Running it:

server      under uvicorn, with draining
signals     SIGTERM, SIGINT and the end of the process
logs        stderr as JSON lines
cluster     on Ray Serve
"""
