"""What holds for the whole session."""

import gc
import os
import signal
from pathlib import Path


def pytest_configure():
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell does for what it starts in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.pop("SSL_CERT_FILE", None)  # no test speaks TLS, and every HTTP client would read all certificates
    os.environ["SSL_CERT_DIR"] = str(Path(__file__).parent)


def pytest_collection_finish():
    """Leave what the imports made out of every later collection: many tests collect, and each would go through it."""
    gc.collect()
    gc.freeze()
