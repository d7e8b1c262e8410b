"""What holds for the whole session."""

import gc
import signal


def pytest_configure():
    """Take Ctrl-C as Python does everywhere else: a shell that starts things in the background has it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish():
    """Leave what the imports made out of every later collection: many tests collect, and each would go through it."""
    gc.collect()
    gc.freeze()
