"""Durations in steps."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.errors import InputError
from infmae_jax.training.duration import in_steps


@pytest.mark.parametrize(
    "duration, steps",
    [("400 epochs", 476_939), ("40 epochs", 47_694), ("12 steps", 12), ("1 step", 1), ("25600 examples", 100),
     ("10 percent", 100), ("0 steps", 0), ("0.001 epochs", 1), ("0.5 epochs", 596)],
)  # fmt: skip
def test_published_sizes(duration, steps):
    assert in_steps(duration, batch_size=256, num_examples=305_241, total_steps=1000) == steps


@given(st.integers(1, 10**6), st.integers(1, 4096), st.integers(1, 10**6))
def test_epochs_and_examples_agree(epochs, batch_size, num_examples):
    sizes = dict(batch_size=batch_size, num_examples=num_examples)
    assert in_steps(f"{epochs} epochs", **sizes) == in_steps(f"{epochs * num_examples} examples", **sizes)


@pytest.mark.parametrize("text", ["", "ten steps", "3 weeks", "-1 steps", "5", "nan epochs"])
def test_unclear_durations_are_refused(text):
    with pytest.raises(InputError, match="write a number and one of steps, epochs"):
        in_steps(text, batch_size=1, num_examples=1)
