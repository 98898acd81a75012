"""Symbolic tracing with values.

Four files name each other: tracer.py makes nodes; proxies.py is what user code holds, and asks the tracer; regions.py
and side_effects.py watch for the tracer what user code does meanwhile. Only tracer.py imports the others when it runs;
they name ValueTracer for type checkers alone.
"""
