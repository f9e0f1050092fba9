"""The bench: speed and accuracy of the ops and of the engine.

    shapes     shapes of each op in a model                     rates       the machine's own highest rates
    cases      operands and call of each op                     agreement   errors against float64
    timing     turns, medians, quantiles, graphs                machine     the environment of a measurement
    ops        every backend of an op beside the others         whole       the engine, from image to map
    measure    one request of `dave-fast bench`                 sweep       latency against S, memory against size
    compare    two revisions in turns                           report, page   tables for the terminal and the docs
    isas       every instruction set of the machine

Operands are random and never zero. Contestants run in turns within one run. A time is a median with its spread. A form
of an op is timed only if it agrees with float64 on the same operands.
"""
