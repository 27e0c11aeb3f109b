"""Runnable documents: each file says what it runs, with which command, on what hardware, and what came out."""
