"""Where training code puts a state dict: under a key of the file, and behind a prefix of every name."""

from collections.abc import Callable, Mapping
from typing import Any

from absl import logging

from data_pipelines.errors import InputError

# In the order of preference: a file of the published code may hold its moving average too.
_KEYS = ("model", "state_dict", "model_state_dict", "model_ema", "module", "ema", "teacher", "student", "net")
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.", "net.")
_MAX_DEPTH = 4
_FIRST_NAMES = ("patch_embed", "blocks", "cls_token", "pos_embed")  # of an encoder without a prefix


def find_state(tree: Mapping[Any, Any], is_tensor: Callable[[Any], bool]) -> dict[str, Any]:
    """The dictionary of tensors in what a file holds; one that is not "model" or the whole file is logged.

    Args:
      tree: what was saved.
      is_tensor: tells tensors from other values.

    Returns:
      name -> tensor, other values left out; empty if there is no such dictionary.

    Raises:
      InputError: several dictionaries hold tensors and none is named "model".
    """
    where = []
    for _ in range(_MAX_DEPTH):
        tensors = {name: item for name, item in tree.items() if isinstance(name, str) and is_tensor(item)}
        found = [key for key in _KEYS if isinstance(tree.get(key), dict)]
        if tensors or not found:
            if where not in ([], ["model"]):
                logging.warning("the weights are under %r", ".".join(where))
            return tensors
        if len(found) > 1 and found[0] != "model":
            raise InputError(f"it holds several models ({', '.join(found)}); save the one that you mean by itself")
        where.append(found[0])
        tree = tree[found[0]]
    return {}


def strip_prefixes(state: dict[str, Any]) -> dict[str, Any]:
    """Names without what wrappers put before all of them, or before those of the encoder; what is cut is logged.

    A prefix counts when all names have it, or when no name without it belongs to an encoder: then the others (a head,
    a projector) are left out.
    """
    cut = ""
    for _ in range(_MAX_DEPTH):
        if any(name.startswith(_FIRST_NAMES) for name in state):
            break
        inside = {p: [name for name in state if name.startswith(p)] for p in _PREFIXES}
        fitting = [p for p, names in inside.items() if names and (len(names) == len(state) or _leads_on(names, p))]
        if len(fitting) != 1:
            break
        (prefix,) = fitting
        others = [name for name in state if not name.startswith(prefix)]
        if others:
            logging.warning("%d tensors beside %r are left out: %s", len(others), cut + prefix, ", ".join(others[:3]))
        state = {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}
        cut += prefix
    if cut:
        logging.warning("the names of the weights begin with %r", cut)
    return state


def _leads_on(names: list[str], prefix: str) -> bool:
    return any(name.removeprefix(prefix).startswith((*_FIRST_NAMES, *_PREFIXES)) for name in names)
