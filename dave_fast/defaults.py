"""The default number of samples, in a module without imports: the command line's help must not wait for torch."""

DEFAULT_SAMPLES = 50
