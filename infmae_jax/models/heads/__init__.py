"""What sits on an encoder in a downstream task: modules that read its feature maps. No I/O.

Losses are the tasks' own, except those of detection, where what is compared with what is part of the head.
"""
