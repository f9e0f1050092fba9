"""The bench: how fast the ops and the engine are, on any machine, beside how exact they are.

    shapes     what a model asks of each op                    rates       what the machine can do at most
    cases      operands, call and float64 truth of each op      agreement   a form that is wrong is not timed
    timing     turns, medians, quantiles, graphs                machine     where a number comes from
    ops        every backend of an op beside the others         whole       the engine, from image to map
    compare    two revisions in turns                           report, page   tables, JSON, docs

Rules that hold everywhere: operands are random and never zero; what is compared runs in turns within one run; a time
is a median with its spread; and nothing is timed that does not agree with float64 on the very operands that are timed.
"""
