"""Workers that get a Ctrl-C while their thread starts: started by `test_leaving.py` in a process of its own.

python interrupted_workers.py SEED COUNT    start COUNT threads; prints how many starts ended how, as JSON
"""

import json
import random
import signal
import sys
from collections import Counter

from looplet import threads

MAX_DELAY_S = 0.00012
"""longer than most starts take"""


armed = []


def interrupt(*_):
    """Raise one KeyboardInterrupt while a thread is being started, and none before or after."""
    if armed:
        armed.clear()
        signal.raise_signal(signal.SIGINT)


def start_one(delay, counts):
    try:
        armed.append(True)
        signal.setitimer(signal.ITIMER_REAL, delay)
        threads.Worker().abandon()
        armed.clear()
    except BaseException as error:
        counts[type(error).__name__] += 1
    else:
        counts["started"] += 1
    signal.setitimer(signal.ITIMER_REAL, 0)


def main(seed, count):
    dice, counts = random.Random(seed), Counter()
    sys.unraisablehook = lambda caught: None  # in a weak reference's callback Python drops an interrupt
    signal.signal(signal.SIGALRM, interrupt)
    for _ in range(count):
        start_one(dice.uniform(0.000002, MAX_DELAY_S), counts)
    sys.stdout.write(json.dumps(counts))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
