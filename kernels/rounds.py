"""The enums of a speculative round, for the contract (`speculate.py`) and the kernels (`speculate_triton.py`)."""

import enum


class Position(enum.IntEnum):
    """Columns of the samples' positions: where every sample is in its table, and what its last round did."""

    ROW = 0  # row of the next step
    START = 1  # ROW before the last round
    EVALUATED = 2  # drafts of the last round
    TAKEN = 3  # steps that the last round committed
    OUTCOME = 4  # an `Outcome`


class Outcome(enum.IntEnum):
    """Ends of a sample's round."""

    ACCEPTED = 0  # every draft was accepted
    REJECTED = 1  # a draft was rejected
    PLAIN = 2  # a plain step
    DONE = 3  # the sample had finished before
