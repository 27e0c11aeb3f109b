"""What is trained: each task has its config, loss, batches and evaluators in one file."""
