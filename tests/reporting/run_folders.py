"""Run folders made by hand, and a strict reader of pages."""

import json
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image

from configs.pretrain import tiny_cpu

NOW = time.time()
VOID = {"meta", "link", "br", "img"}


class Page(HTMLParser):
    """Reads a page strictly: tags must be closed in order. Keeps texts, and tags with attributes."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.texts, self.wrong = [], [], [], []
        self.feed(html)
        self.close()
        self.wrong += [f"{tag} is not closed" for tag in self.open]

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}> closes another tag")

    def handle_data(self, text):
        if not {"style", "script"} & set(self.open):
            self.texts.append(text)

    @property
    def text(self):
        """What a reader sees."""
        return " ".join(" ".join(self.texts).split())

    def count(self, tag, **wanted):
        return sum(t == tag and all(a.get(k) == v for k, v in wanted.items()) for t, a in self.tags)


def parse(path):
    page = Page(Path(path).read_text(encoding="utf-8"))
    assert not page.wrong, page.wrong
    return page


def event(seconds, name, step, **details):
    return {"time": NOW + seconds, "step": step, "event": name, **details}


def metrics_row(step, **more):
    return {
        "step": step, "time": NOW - 600 + step, "epoch": step / 4, "loss": 1.5 - step / 100, "learning_rate": 1e-3,
        "grad_norm": 2.0, "images_per_second": 40.0, "data_wait_seconds": 0.1, "goodput": 0.875,
        "device_memory_gib": 1.25, "skipped_updates": 0, "substituted_samples": 0, **more,
    }  # fmt: skip


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(folder, rows=(), events=(), config=True, record=True, pictures=()):
    folder.mkdir(parents=True, exist_ok=True)
    if config:
        settings = {**tiny_cpu.get_config().to_dict(), "data_set": {"images": 640}}
        (folder / "config.json").write_text(json.dumps(settings))
    if record:
        versions, table = {"jax": "0.10.2"}, [{"name": "encoder/x", "shape": [3, 4], "sharding": "PartitionSpec()"}]
        (folder / "run_info.json").write_text(json.dumps({
            "parameters": 2934512, "gflop_per_image": 1.25, "mesh": {"data": 2, "fsdp": 1}, "devices": "2 x cpu",
            "versions": versions, "parameter_table": table,
        }))  # fmt: skip
    if rows:
        write_lines(folder / "metrics.jsonl", rows)
    if events:
        write_lines(folder / "events.jsonl", events)
    for step in pictures:
        (folder / "pictures").mkdir(exist_ok=True)
        pixels = np.full((40, 60, 3), step % 256, np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"step_{step:08d}.png")
    return folder


def make_eventful_run(folder):
    """A run with everything that can happen."""
    rows = [metrics_row(s, loss="nan" if s == 40 else 1.5 - s / 100, skipped_updates=2 * (s > 40)) for s in range(100)]
    events = [
        event(-600, "start", 0, processes=1, devices=2, total_steps=100),
        event(-580, "save", 20, seconds_blocked=0.25),
        event(-560, "skip", 40, loss="nan", grad_norm="nan", reason="non-finite loss", records=["hit/a.jpg", "b<1>"]),
        event(-559, "skip", 41, loss=9.5, grad_norm=1.0, reason="spike", records=["c"]),
        event(-550, "rollback", 42, to_step=20, data_order=1),
        event(-540, "checkpoint_damaged", 60, checkpoint=60, reason="digest of encoder/x differs"),
        event(-530, "save_failed", 60, reason="no space left"),
        event(-500, "resume", 20),
        event(-20, "finished", 100, code=0, shares={"stepping": 0.9, "data_wait": 0.06, "other": 0.04}),
    ]
    return make_run(folder, rows, events, pictures=range(0, 101, 10))
