"""The whole detector on a tiny encoder: shapes, invariances, gradients, and a pyramid against a slow twin."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from infmae_jax.models.config import DetectionHeadConfig, EncoderConfig, variant
from infmae_jax.models.heads.detection import Detector, Targets
from infmae_jax.models.heads.pyramid import FeaturePyramid
from tests.models.parameters import randomised
from tests.models.test_segmentation_heads import slow_conv, slow_norm

ENCODER = EncoderConfig(
    widths=(8, 12, 16), depths=(1, 1, 1), heads=2, in_channels=1, depthwise="conv", fuse_stages=False
)
HEAD = DetectionHeadConfig(
    channels=8, box_channels=16, box_convs=1, mask_convs=1, anchor_sizes=(8, 12, 16, 24, 32), rpn_samples=16,
    pre_nms_train=40, pre_nms_test=30, proposals_train=30, proposals_test=20, rois=16, max_candidates=40,
    max_detections=6, score_threshold=0.01,
)  # fmt: skip
CLASSES, OBJECTS, CANVAS = 3, 4, (64, 96)
LOSSES = {"rpn_class", "rpn_box", "box_class", "box_box", "mask"}


def detector(**changes):
    return Detector(ENCODER, dataclasses.replace(HEAD, **changes), CLASSES, masks=True)


@functools.cache
def params_of(module):
    return randomised(module, np.zeros((1, *CANVAS, 1), np.float32))


@pytest.fixture(scope="module")
def batch():
    """Four images, the second smaller than the canvas, the third without objects; a crowd in the first."""
    rng = np.random.default_rng(0)
    corner, sides = rng.uniform(0, 50, (4, OBJECTS, 2)), rng.uniform(6, 30, (4, OBJECTS, 2))
    boxes = np.concatenate([corner, np.minimum(corner + sides, [90, 60])], axis=2).astype(np.float32)
    valid, crowd = rng.random((4, OBJECTS)) < 0.8, np.zeros((4, OBJECTS), bool)
    valid[:, 0], valid[2], crowd[0, 1] = True, False, True
    boxes[~valid] = 0
    pixels = rng.standard_normal((4, *CANVAS, 1)).astype(np.float32)
    sizes = np.array([CANVAS, (50, 70), CANVAS, CANVAS], np.int32)
    classes = rng.integers(0, CLASSES, (4, OBJECTS)).astype(np.int32)
    masks = (rng.random((4, OBJECTS, 56, 56)) < 0.7).astype(np.float32)
    return pixels, Targets(sizes, boxes, classes, valid, crowd & valid, masks)


@functools.cache
def losses_of(module):
    return jax.jit(lambda *args: module.apply({"params": args[0]}, *args[1:], method="losses"))


@pytest.mark.parametrize("cascade", [False, True])
def test_parameters_and_names(cascade, batch):
    module = detector(cascade=cascade)
    params = params_of(module)
    heads = ("box1", "box2", "box3") if cascade else ("box",)
    assert set(params) == {"encoder", "pyramid", "rpn", "mask", *heads}
    codes = 1 if cascade else CLASSES
    assert params[heads[0]]["codes"]["kernel"].shape == (16, 4 * codes)
    assert params[heads[0]]["logits"]["kernel"].shape == (16, CLASSES + 1)
    found = jax.eval_shape(losses_of(module), params, *batch, jax.random.key(0))
    names = {name + end for name in ("box_class", "box_box") for end in ("_1", "_2", "_3")} if cascade else LOSSES
    assert set(found) == LOSSES - ({"box_class", "box_box"} if cascade else set()) | names
    assert {(x.shape, x.dtype) for pair in found.values() for x in pair} == {((), jnp.dtype("float32"))}


@pytest.mark.parametrize("cascade", [False, True])
def test_detections(cascade, batch):
    module = detector(cascade=cascade)
    pixels, targets = batch
    found = jax.jit(lambda *args: module.apply({"params": args[0]}, *args[1:], method="detect"))(
        params_of(module), pixels, targets.sizes
    )
    assert found.boxes.shape == (4, 6, 4) and found.masks.shape == (4, 6, 28, 28)
    assert found.valid.any() and found.scores.dtype == jnp.float32 and found.classes.dtype == jnp.int32
    assert (np.diff(found.scores, axis=1) <= 0).all() and (found.masks >= 0).all() and (found.masks <= 1).all()
    assert (found.classes >= 0).all() and (found.classes < CLASSES).all()
    limit = np.tile(targets.sizes[:, None, ::-1], (1, 1, 2))
    assert (found.boxes >= 0).all() and (found.boxes <= limit).all()
    assert (np.asarray(found.boxes)[..., 2:] > np.asarray(found.boxes)[..., :2])[found.valid].all()


@pytest.mark.parametrize("cascade", [False, True])
def test_gradients_without_any_object(cascade, batch):
    """Finite, also with empty boxes in the padding, and nothing learnt of boxes and masks."""
    pixels, targets = batch
    module = detector(cascade=cascade)
    none = targets._replace(valid=np.zeros_like(targets.valid), boxes=np.zeros_like(targets.boxes))

    def total(params, targets):
        found = module.apply({"params": params}, pixels, targets, jax.random.key(0), method="losses")
        return sum(value for value, _ in found.values()), found

    gradient = jax.jit(jax.grad(total, has_aux=True))
    for objects, empty in ((none, True), (targets, False)):
        grads, found = gradient(params_of(module), objects)
        assert all(count == 4 and np.isfinite(total) for total, count in found.values())
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
        of_objects = found.keys() & {"rpn_box", "box_box", "box_box_1", "mask"}
        assert all((found[name][0] == 0) == empty for name in of_objects)
        assert np.any(grads["mask"]["logits"]["kernel"]) != empty
        assert np.any(grads["encoder"]["patch_embed1"]["proj"]["kernel"])


def assert_same(first, second, tolerance=2e-5):
    for name in first:
        np.testing.assert_allclose(second[name][0], first[name][0], rtol=tolerance, atol=1e-6, err_msg=name)


def test_order_of_boxes_and_images_is_nothing(batch):
    module = detector(cascade=True)
    pixels, targets = batch
    losses, params, key = losses_of(module), params_of(module), jax.random.key(5)
    first = losses(params, pixels, targets, key)
    rng = np.random.default_rng(1)
    order = np.stack([rng.permutation(OBJECTS) for _ in range(4)])
    moved = {
        name: np.take_along_axis(value, order.reshape(order.shape + (1,) * (value.ndim - 2)), axis=1)
        for name, value in targets._asdict().items()
        if name != "sizes"
    }
    assert_same(first, losses(params, pixels, targets._replace(**moved), key))
    images = np.array([2, 0, 3, 1])
    assert_same(first, losses(params, pixels[images], jax.tree.map(lambda x: x[images], targets), key))
    other = losses(params, pixels, targets, jax.random.key(6))
    assert any(other[name][0] != first[name][0] for name in ("rpn_class", "rpn_box"))


def test_padding_of_objects_is_nothing(batch):
    """Wherever the boxes of padding lie, and whatever their class and mask."""
    module = detector(cascade=True)
    pixels, targets = batch
    valid = targets.valid[..., None]
    other = targets._replace(
        boxes=np.where(valid, targets.boxes, np.float32([3, 4, 33, 40])),
        classes=np.where(targets.valid, targets.classes, 2),
        masks=np.where(valid[..., None], targets.masks, np.float32(1)),
    )
    losses, key = losses_of(module), jax.random.key(5)
    assert_same(*(losses(params_of(module), pixels, objects, key) for objects in (targets, other)), tolerance=0)


def test_four_devices_or_one(batch):
    module = detector(cascade=True)
    losses, params, key = losses_of(module), params_of(module), jax.random.key(5)
    mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
    spread = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    params_there = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    assert_same(losses(params, *batch, key), losses(params_there, *spread, key), tolerance=1e-6)


def test_without_masks(batch):
    pixels, targets = batch
    module = Detector(ENCODER, HEAD, CLASSES)
    params = params_of(module)
    assert set(params) == {"encoder", "pyramid", "rpn", "box"}
    found = jax.eval_shape(losses_of(module), params, pixels, targets._replace(masks=None), jax.random.key(0))
    assert set(found) == LOSSES - {"mask"}
    assert jax.eval_shape(lambda: module.apply({"params": params}, pixels)).masks is None
    masked = detector()
    with pytest.raises(ValueError, match="the targets have none"):
        jax.eval_shape(losses_of(masked), params_of(masked), pixels, targets._replace(masks=None), jax.random.key(0))


def test_bfloat16_gives_float32_results(batch):
    pixels, targets = batch
    module = Detector(dataclasses.replace(ENCODER, dtype="bfloat16"), HEAD, CLASSES, masks=True)
    params = params_of(detector())
    found = jax.eval_shape(losses_of(module), params, pixels, targets, jax.random.key(0))
    assert {value.dtype for pair in found.values() for value in pair} == {jnp.dtype("float32")}
    seen = jax.eval_shape(lambda: module.apply({"params": params}, pixels))
    assert seen.boxes.dtype == seen.scores.dtype == seen.masks.dtype == jnp.float32


def slow_pyramid(params, stages):
    coarse = stages[-1]
    height, width = (side // 2 for side in coarse.shape[:2])
    maps = [*stages, coarse[: 2 * height, : 2 * width].reshape(height, 2, width, 2, -1).max(axis=(1, 3))]

    def layer(name, x):
        return slow_norm(params[name]["norm"], slow_conv(x, params[name]["conv"]["kernel"]), None)

    levels = [layer(f"lateral{i}", x) for i, x in enumerate(maps, 2)]
    for i in (2, 1, 0):
        rows, columns = np.indices(levels[i].shape[:2]) // 2
        levels[i] = levels[i] + levels[i + 1][rows, columns]
    levels = [layer(f"output{i}", x) for i, x in enumerate(levels, 2)]
    return [*levels, levels[-1][::2, ::2]]


def test_pyramid():
    rng = np.random.default_rng(2)
    stages = [rng.standard_normal((1, 16 >> i, 24 >> i, width)).astype(np.float32) for i, width in enumerate((3, 4, 5))]
    module = FeaturePyramid(8, "layer", "float32")
    params = randomised(module, stages)
    found = jax.jit(lambda params, stages: module.apply({"params": params}, stages))(params, stages)
    wanted = slow_pyramid(params, [x[0] for x in stages])
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_allclose(x[0], y, atol=1e-4)


def test_sides_that_stride_32_does_not_divide():
    """48 x 80: stage 3 has 3 x 5 cells, and its pooled map 2 x 3."""
    stages = [jnp.zeros((1, 12 // 2**i, 20 // 2**i, 4)) for i in range(3)]
    module = FeaturePyramid(8, "group", "float32")
    found = jax.eval_shape(module.init_with_output, jax.random.key(0), stages)[0]
    assert [x.shape[1:3] for x in found] == [(12, 20), (6, 10), (3, 5), (2, 3), (1, 2)]


def test_encoders_and_anchors_that_do_not_fit():
    pixels = jax.ShapeDtypeStruct((1, *CANVAS, 1), jnp.float32)
    vit = dataclasses.replace(variant("tiny").encoder, kind="vit", fuse_stages=False)
    for module, message in (
        (Detector(vit, HEAD, CLASSES), "use a hybrid one"),
        (Detector(ENCODER, dataclasses.replace(HEAD, anchor_sizes=()), CLASSES), "anchor_sizes is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(module.init, jax.random.key(0), pixels)


@pytest.mark.parametrize("values", [
    dict(channels=4), dict(box_channels=0), dict(norm="batch"), dict(roi_align="cuda"), dict(anchor_sizes=(8, 16)),
    dict(anchor_sizes=(0, 1, 2, 3, 4)), dict(ratios=()), dict(ratios=(-1.0,)), dict(rpn_iou=(0.7, 0.3)), dict(rois=0),
    dict(roi_iou=0.8, cascade=True), dict(score_threshold=1.0), dict(max_detections=0), dict(max_detections=2000),
    dict(rpn_positive=0.0), dict(nms=1.5), dict(pre_nms_train=0), dict(rpn_iou=(0.3, float("nan"))),
])  # fmt: skip
def test_impossible_heads(values):
    with pytest.raises(ValueError, match=rf"model\.head\.{next(iter(values))}=.* must be"):
        DetectionHeadConfig(**values)
