"""A process of a job that does nothing but watch its peers: python -m tests.training.hosts.peers_process JSON."""

import json
import sys
import time

from infmae_jax.training.config import DistributedConfig
from infmae_jax.training.hosts.peers import meet

if __name__ == "__main__":
    task = json.loads(sys.argv[1])
    config = DistributedConfig(timeout_seconds=30, heartbeat_seconds=task["silence"], stall_seconds=0)
    peers = meet(("127.0.0.1", task["port"]), task["index"], task["count"], {}, config)
    print("met", flush=True)
    sys.stdin.readline()  # all have met: nobody ends before the others have said so
    for step in range(10**6):
        peers.progress(step)
        time.sleep(0.05)
