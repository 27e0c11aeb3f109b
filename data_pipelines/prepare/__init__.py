"""Infrared images of any origin -> validated, de-duplicated shards and a reason for every file left out.

    python -m data_pipelines.prepare --input=DIR [--input='DIR/**/*.tif' --input=FILE.zip ...] --output=SHARDS

`run.py` lists the files (`inputs.py`, `archives.py`), examines them in parallel parts (`collect.py`, `curate.py`),
finds the duplicates (`duplicates.py`), writes the shards, then the lists and pictures (`results.py`). `labelled.py`
writes examples with labels, of a CSV table or of any other source, as the same kind of shard set:

    python -m data_pipelines.prepare --table=LABELS.csv --label=COLUMN [--label=COLUMN ...] --output=SHARDS
"""

from data_pipelines.prepare.labelled import prepare_table, write_examples
from data_pipelines.prepare.run import PrepareConfig, prepare

__all__ = ["PrepareConfig", "prepare", "prepare_table", "write_examples"]
