"""Faults, load and abuse, counted: what is lost, what is wrong. `make chaos`, or by hand

    PYTHONPATH=tests python -m chaos [--long] [--only NAME ...]

One module per figure, each with a `run` that answers its figures. Only processes that descend from
the one that runs this are ever killed.
"""
