"""What a pretrained encoder is worth: probes and transfer, one `run` a task."""
