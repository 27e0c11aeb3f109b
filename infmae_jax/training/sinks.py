"""Where logged steps go besides metrics.jsonl: TensorBoard, Prometheus, Weights & Biases."""

from __future__ import annotations

import io
import os
import re
import socket
import struct
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from absl import logging
from PIL import Image

from data_pipelines.errors import InputError


class Sink(Protocol):
    """Takes logged steps. `errors` are the failures that a run must survive."""

    name: str
    errors: tuple[type[Exception], ...]

    def write(self, row: Mapping[str, float]) -> None:
        """One logged step, with the keys `step` and `time`."""

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        """image: (H,W,3) uint8."""

    def rewind(self, step: int) -> None:
        """Forgets `step` and later, as far as the service can."""

    def close(self) -> None: ...


class AppendOnlyFile:
    """A file to which whole pieces are appended: after a failure (OSError) it is as long as before.

    Unbuffered, so that the process can be killed at any time, and opened when first used, so that opening can be tried
    anew.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file: io.FileIO | None = None
        self._end = 0

    @property
    def size(self) -> int:
        """Bytes of what was appended whole."""
        self._opened()
        return self._end

    def append(self, data: bytes) -> None:
        file = self._opened()
        try:
            written = file.write(data)
            if written != len(data):
                raise OSError(f"{self.path}: {written} of {len(data)} bytes written, is the disk full?")
        except OSError:
            file.truncate(self._end)
            raise
        self._end += len(data)

    def read(self) -> bytes:
        """All whole lines."""
        self._opened()
        return self.path.read_bytes()

    def truncate(self, end: int) -> None:
        """Cuts everything from byte `end` on."""
        self._opened().truncate(end)
        self._end = end

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _opened(self) -> io.FileIO:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = open(self.path, "ab", buffering=0)
            # A process killed while it wrote leaves a piece of a line, which the next line must not continue.
            self._end = self.path.read_bytes().rfind(b"\n") + 1
            file.truncate(self._end)
            self._file = file
        return self._file


class TensorBoard:
    """Event files in `folder`, one record a logged step.

    Written here and not by tensorboardX's writer, whose thread dies of a full disk and then blocks the loop for ever.
    """

    name, errors = "tensorboard", (OSError,)

    def __init__(self, folder: Path):
        # A file for each process; TensorBoard reads them in the order of their names.
        seconds, fraction = divmod(time.time_ns(), 10**9)
        unique = f"{seconds:010d}.{fraction:09d}.{socket.gethostname()}.{os.getpid()}"
        self._file = AppendOnlyFile(folder / f"events.out.tfevents.{unique}")

    def write(self, row: Mapping[str, float]) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=key, simple_value=value) for key, value in _scalars(row).items()]
        self._append(step=int(row["step"]), wall_time=row["time"], summary=Summary(value=values))

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        height, width, channels = image.shape
        png = io.BytesIO()
        Image.fromarray(image).save(png, format="PNG")
        drawn = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=png.getvalue())
        self._append(step=step, summary=Summary(value=[Summary.Value(tag=name, image=drawn)]))

    def rewind(self, step: int) -> None:
        from tensorboardX.proto.event_pb2 import SessionLog

        # TensorBoard drops what it has of this step and later when it reads a session start there.
        self._append(step=step, session_log=SessionLog(status=SessionLog.START))

    def close(self) -> None:
        self._file.close()

    def _append(self, **event: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        data = _record(Event(**{"wall_time": time.time(), **event}))
        if self._file.size == 0:
            data = _record(Event(wall_time=time.time(), file_version="brain.Event:2")) + data
        self._file.append(data)


def _record(event: Any) -> bytes:
    """A protocol buffer as TFRecord: length, its checksum, data, their checksum."""
    from tensorboardX.record_writer import masked_crc32c

    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    return b"".join([length, struct.pack("<I", masked_crc32c(length)), data, struct.pack("<I", masked_crc32c(data))])


class Prometheus:
    """A text file for the textfile collector of node_exporter: the latest values, as infmae_<key>{run="..."}.

    A key with slashes, param_norm/encoder/..., becomes infmae_param_norm{layer="encoder/..."}. `infmae_time` is when
    the row was logged, in unix seconds, by which a run that stands still is found. Replacing a file can wait for the
    disk, and nobody scrapes more often: rows within `interval` seconds of the last one wait for the next, or the end.
    """

    name, errors = "observe.prometheus_file", (OSError,)

    def __init__(self, path: str, run: str, interval: float = 5.0):
        self._path, self._run, self._interval = Path(path), run, interval
        self._latest: Mapping[str, float] | None = None
        self._next_time = 0.0
        if self._path.suffix != ".prom":
            raise InputError(f"observe.prometheus_file={path} does not end in .prom: node_exporter would not read it")
        if not os.access(self._path.parent, os.W_OK | os.X_OK):
            raise InputError(
                f"observe.prometheus_file={path}: no folder {self._path.parent} that can be written to; "
                "name the one that node_exporter's --collector.textfile.directory names"
            )

    def write(self, row: Mapping[str, float]) -> None:
        self._latest = row
        if row["time"] >= self._next_time:
            self._next_time = row["time"] + self._interval
            self._replace()

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        pass

    def rewind(self, step: int) -> None:
        pass

    def close(self) -> None:
        if self._latest is not None:
            self._replace()

    def _replace(self) -> None:
        from prometheus_client import CollectorRegistry, Gauge, write_to_textfile

        registry = CollectorRegistry()
        gauges: dict[str, Gauge] = {}
        for key, value in self._latest.items():
            family, _, layer = key.partition("/")
            labels = {"run": self._run, **({"layer": layer} if layer else {})}
            name = f"infmae_{re.sub('[^a-zA-Z0-9_]', '_', family)}"
            if name not in gauges:
                text = f"{family.replace('_', ' ')} at the last logged step"
                gauges[name] = Gauge(name, text, list(labels), registry=registry)
            gauges[name].labels(**labels).set(value)
        write_to_textfile(str(self._path), registry)


class WeightsAndBiases:
    """A Weights & Biases run, the same one after restarts (RUN/wandb_id).

    WANDB_MODE=offline works without network, and so does a run that finds no network when it starts: `wandb sync`
    uploads its folder later. The service keeps what it has: after a rollback, the steps made again appear twice.

    Raises:
      InputError: the package is missing, or nobody is logged in.
    """

    name, errors = "observe.wandb_project", (Exception,)  # it is a network service: whatever it raises

    def __init__(self, run: str | Path, project: str, config: Mapping[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise InputError(
                "observe.wandb_project needs the package wandb: pip install 'infmae-jax[wandb]', or leave it empty"
            ) from error
        self._image = wandb.Image
        options = {
            "project": project,
            "id": _kept_id(Path(run) / "wandb_id"),
            "name": Path(run).resolve().name,
            "resume": "allow",
            "dir": str(run),
            "config": dict(config),
            "settings": wandb.Settings(console="off", silent=True),
        }
        try:
            self._run = wandb.init(**options)
        except wandb.errors.CommError as error:
            logging.warning("Weights & Biases cannot be reached, this run is kept for wandb sync: %s", error)
            wandb.teardown()  # it keeps the failed one in use
            self._run = wandb.init(**options, mode="offline")
        except wandb.Error as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise InputError(
                f"observe.wandb_project={project}: {reason}, or set WANDB_MODE=offline, or leave it empty"
            ) from error
        self._run.define_metric("*", step_metric="step")

    def write(self, row: Mapping[str, float]) -> None:
        self._run.log({"step": int(row["step"]), **_scalars(row)})

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        self._run.log({"step": step, name: self._image(image)})

    def rewind(self, step: int) -> None:
        pass

    def close(self) -> None:
        self._run.finish()


def _scalars(row: Mapping[str, float]) -> dict[str, float]:
    return {key: float(value) for key, value in row.items() if key not in ("step", "time")}


def _kept_id(path: Path) -> str:
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(uuid.uuid4().hex)
        temporary.replace(path)
    return path.read_text().strip()
