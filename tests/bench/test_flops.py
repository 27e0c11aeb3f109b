"""Operations: the count by hand against XLA's, against the published figures and against a count by enumeration."""


import pytest

from infmae_jax.bench import flops
from infmae_jax.models.config import variant

SIZE, KEEP = (224, 224), 49
SHALLOW = variant("base", depths=(2, 1, 2))


@pytest.mark.parametrize("visible_only, published_gflop", [(False, 27.5), (True, 15.0)])
def test_base_against_the_figures_of_the_plain_reimplementation(visible_only, published_gflop):
    """Those have norms, activations and softmax, and predict visible patches too (2 % of 15.0)."""
    by_hand = sum(flops.hand_count(variant("base"), SIZE, KEEP, visible_only).values())
    assert 0.94 * published_gflop < by_hand < 0.98 * published_gflop


def xla_stages(model, image_size, keep):
    """XLA's count by stage, before optimisation, from programs that differ by one block or by the decoder."""

    def count(depths, encoder_only=True):
        shallow = model.replace(depths=depths)
        return flops.xla_count(shallow, image_size, keep, compiled=False, encoder_only=encoder_only)

    def difference(more, less):
        return {what: more[what] - less[what] for what in more}

    encoder = count((1, 1, 1))
    deeper = ((2, 1, 1), (1, 2, 1), (1, 1, 2)) if model.encoder.kind == "hybrid" else (None, None, (1, 1, 2))
    stages, rest = {}, encoder
    for stage, depth, depths in zip(flops.STAGES, model.encoder.depths, deeper, strict=False):
        if depths:
            block = difference(count(depths), encoder)
            rest = difference(rest, block)
            stages[stage] = {what: depth * gflop for what, gflop in block.items()}
    decoder = difference(count((1, 1, 1), encoder_only=False), encoder)
    return stages | {flops.STAGES[3]: rest, flops.STAGES[4]: decoder}


MODELS = {"visible only": SHALLOW.replace(**flops.WAYS["visible only"]), "vit": SHALLOW.replace(kind="vit")}
PUBLISHED = {"as published": SHALLOW.replace(**flops.WAYS["as published"])}  # counted by hand below too


def pytest_generate_tests(metafunc):
    if "model" in metafunc.fixturenames:
        models = MODELS | (PUBLISHED if metafunc.config.getoption("--long") else {})
        metafunc.parametrize("model", models.values(), ids=models.keys())


def test_every_stage_by_hand_is_a_little_less_than_xlas_count(model):
    by_hand = flops.hand_count(model, SIZE, KEEP, model.encoder.visible_only)
    by_xla = xla_stages(model, SIZE, KEEP)
    assert by_hand.keys() == by_xla.keys()
    for stage, gflop in by_hand.items():
        assert 0.9 * by_xla[stage]["forward"] < gflop <= by_xla[stage]["forward"], stage
        # The first layer needs no gradient of its input.
        assert 1.9 < by_xla[stage]["forward + backward"] / by_xla[stage]["forward"] < 3.01, stage
    whole = flops.xla_count(model, SIZE, KEEP, compiled=False)
    for what, gflop in whole.items():
        assert sum(counts[what] for counts in by_xla.values()) == pytest.approx(gflop, rel=1e-3)


def test_masked_patches_cost_nothing():
    model = variant("small")
    visible, published = (flops.hand_count(model, SIZE, KEEP, way) for way in (True, False))
    for stage in flops.STAGES[:2]:
        assert published[stage] == pytest.approx(196 / 49 * visible[stage])
    assert published[flops.STAGES[2]] == visible[flops.STAGES[2]]
    everything = flops.hand_count(model.replace(in_channels=1), SIZE, 196, True)
    assert everything[flops.STAGES[0]] == published[flops.STAGES[0]]
