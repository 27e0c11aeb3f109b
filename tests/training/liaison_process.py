"""A process of a job that does nothing but keep in touch: python -m tests.training.liaison_process JSON."""

import json
import sys
import threading
import time

from infmae_jax.training import liaison


def main(port, index, count, behaviour, timeout=20.0, silence=20.0, stall=0.0):
    group = liaison.meet(("127.0.0.1", port), index, count, {"config seed": "0"}, timeout, silence, stall)
    print("met", flush=True)
    sys.stdin.readline()  # all have met: nobody ends before the others have said so
    if behaviour == "finish":
        group.close()
        return
    if behaviour == "fail":
        group.fail(2, "shard 7 is damaged")
        sys.exit(2)
    for step in range(10**6):
        if behaviour == "hang" and step == 3:
            group.progress(step, "reading data")
            threading.Event().wait()
        group.progress(step if behaviour != "wait" else 4)
        time.sleep(0.05)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
