"""The command line: one file a command, and the only place that prints.

`app` is the entry point `dave-fast`; `options` has the options that commands share.
"""
