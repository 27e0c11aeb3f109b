"""One language for durations in configs: "400 epochs", "20000 steps", "10 percent"."""

from data_pipelines.errors import InputError


def in_steps(duration: str, *, batch_size: int, num_examples: int, total_steps: int | None = None) -> int:
    """Converts a duration to whole steps (rounded to the nearest; a positive duration is at least one step).

    Args:
      duration: "<number> steps|epochs|examples|percent"; "0 steps" means never.
      batch_size: global batch size in images.
      num_examples: images in one epoch.
      total_steps: what percentages refer to.

    Raises:
      InputError: a text that does not follow this form.
    """
    number, _, unit = duration.strip().partition(" ")
    unit = unit.strip() + ("s" if unit.strip() in ("step", "epoch", "example") else "")
    try:
        amount = float(number)
    except ValueError:
        amount = -1.0
    scales = {
        "steps": 1.0,
        "epochs": num_examples / batch_size,
        "examples": 1.0 / batch_size,
        "percent": None if total_steps is None else total_steps / 100.0,
    }
    if not 0 <= amount < float("inf") or (scale := scales.get(unit)) is None:
        raise InputError(f"duration {duration!r} is not understood: write a number and one of {', '.join(scales)}")
    return max(1, round(amount * scale)) if amount > 0 else 0
