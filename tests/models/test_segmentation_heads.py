"""UperNet and FCN against slow twins in NumPy: pooling, resizing and convolutions by loops."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infmae_jax.models.config import EncoderConfig, SegmentationHeadConfig, variant
from infmae_jax.models.encoder import HybridEncoder
from infmae_jax.models.heads import segmentation
from infmae_jax.models.heads.layers import Output
from infmae_jax.models.heads.segmentation import FCN, Segmenter, Stride32, UperNet
from tests.models.parameters import randomised

ENCODER = EncoderConfig(
    widths=(8, 12, 16), depths=(1, 1, 1), heads=2, in_channels=1, depthwise="conv", fuse_stages=False
)
CLASSES = 5


def slow_pool(x, bins):
    """(H,W,C) -> (bins,bins,C)."""
    out = np.zeros((bins, bins, x.shape[2]))
    for i, j in np.ndindex(bins, bins):
        spans = [slice(int(np.floor(n * s / bins)), int(np.ceil((n + 1) * s / bins))) for n, s in zip((i, j), x.shape)]
        out[i, j] = x[spans[0], spans[1]].mean(axis=(0, 1))
    return out


def slow_resize(x, size):
    """(H,W,C) -> (*size,C): the two nearest rows and columns of every half-pixel centre."""
    out = np.zeros((*size, x.shape[2]))
    for i, j in np.ndindex(*size):
        taps = []
        for n, old, new in zip((i, j), x.shape, size):
            centre = max((n + 0.5) * old / new - 0.5, 0)
            low = int(centre)
            taps.append([(low, 1 - (centre - low)), (min(low + 1, old - 1), centre - low)])
        out[i, j] = sum(a * b * x[row, column] for row, a in taps[0] for column, b in taps[1])
    return out


def slow_conv(x, kernel, stride=1, pad=None):
    size = kernel.shape[0]
    pad = size // 2 if pad is None else pad
    x = np.pad(x, ((pad, pad), (pad, pad), (0, 0)))
    shape = [(side - size) // stride + 1 for side in x.shape[:2]]
    out = np.zeros((*shape, kernel.shape[3]))
    for i, j, u, v in np.ndindex(*shape, size, size):
        out[i, j] += x[i * stride + u, j * stride + v] @ kernel[u, v]
    return out


def slow_norm(params, x, groups):
    """LayerNorm where `groups` is None."""
    if groups is None:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    else:
        parts = np.split(x, groups, axis=-1)
        x = np.concatenate([(part - part.mean()) / np.sqrt(part.var() + 1e-5) for part in parts], axis=-1)
    return x * params["scale"] + params["bias"]


def slow_module(params, x, groups):
    return np.maximum(slow_norm(params["norm"], slow_conv(x, params["conv"]["kernel"]), groups), 0)


def slow_classifier(params, x):
    return x @ params["kernel"] + params["bias"]


def slow_upernet(params, maps, groups):
    def module(name, x):
        return slow_module(params[name], x, groups)

    coarse, size = maps[3], maps[3].shape[:2]
    pooled = [slow_resize(module(f"pool{bins}", slow_pool(coarse, bins)), size) for bins in (1, 2, 3, 6)]
    level4 = module("bottleneck", np.concatenate([coarse, *pooled], axis=-1))
    level3 = module("lateral3", maps[2]) + slow_resize(level4, maps[2].shape[:2])
    level2 = module("lateral2", maps[1]) + slow_resize(level3, maps[1].shape[:2])
    level1 = module("lateral1", maps[0]) + slow_resize(level2, maps[0].shape[:2])
    levels = [module("pyramid1", level1), module("pyramid2", level2), module("pyramid3", level3), level4]
    whole = np.concatenate([slow_resize(x, maps[0].shape[:2]) for x in levels], axis=-1)
    return slow_classifier(params["classifier"], module("fuse", whole))


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("size", [(3, 2), (2, 5)])
@pytest.mark.parametrize("norm, groups", [("layer", None), ("group", 2)])
def test_upernet_against_loops(float64, norm, groups, size):
    rng = np.random.default_rng(0)
    h, w = size  # of stage 3; the coarsest map is smaller than most pools
    shapes = [(4 * h, 4 * w, 4), (2 * h, 2 * w, 6), (h, w, 8), ((h - 1) // 2 or 1, (w - 1) // 2 or 1, 8)]
    maps = [rng.standard_normal((2, *shape)) for shape in shapes]
    module = UperNet(SegmentationHeadConfig(channels=16, norm=norm), CLASSES, "float64")
    params = randomised(module, maps)
    out = jax.jit(module.apply)({"params": params}, maps)
    assert out.shape == (2, 4 * h, 4 * w, CLASSES) and out.dtype == jnp.float64
    for i in range(2):
        expected = slow_upernet(params, [x[i] for x in maps], groups)
        np.testing.assert_allclose(out[i], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("convs, join, norm, groups", [
    (2, True, "group", 4), (1, False, "group", 4), (1, True, "layer", None),
])  # fmt: skip
def test_fcn_against_loops(float64, convs, join, norm, groups):
    x = np.random.default_rng(0).standard_normal((2, 4, 3, 6))
    module = FCN(32, convs, join, SegmentationHeadConfig(norm=norm), CLASSES, "float64")
    params = randomised(module, x)
    out = jax.jit(module.apply)({"params": params}, x)
    for image, logits in zip(x, out, strict=True):
        y = image
        for i in range(convs):
            y = slow_module(params[f"conv{i + 1}"], y, groups)
        if join:
            y = slow_module(params["join"], np.concatenate([image, y], axis=-1), groups)
        np.testing.assert_allclose(logits, slow_classifier(params["classifier"], y), rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape, before", [((5, 6), (0, 0)), ((2, 2), (0, 0)), ((1, 4), (1, 0))])
def test_stride_32_against_loops(float64, shape, before):
    erf = np.vectorize(math.erf)
    x = np.random.default_rng(0).standard_normal((1, *shape, 16))
    module = Stride32("group", "float64")
    params = randomised(module, x)
    out = jax.jit(module.apply)({"params": params}, x)[0]
    whole = np.zeros((*(max(side, 3) for side in shape), 16))
    whole[before[0] : before[0] + shape[0], before[1] : before[1] + shape[1]] = x[0]
    y = slow_norm(params["norm"], slow_conv(whole, params["conv"]["kernel"], stride=2, pad=0), 2)
    np.testing.assert_allclose(out, 0.5 * y * (1 + erf(y / 2**0.5)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("old, new", [((7, 5), (15, 9)), ((6, 9), (3, 4)), ((1, 2), (3, 3))])
def test_pooling_and_resizing_against_loops_and_pytorch(old, new):
    x = np.random.default_rng(0).standard_normal((2, *old, 3)).astype(np.float32)
    bins = new[0]
    pooled = np.einsum("bhwc,ih,jw->bijc", x, *(segmentation.adaptive_pool_matrix(side, bins) for side in old))
    resized = segmentation.resize(jnp.asarray(x), new)
    np.testing.assert_allclose(pooled, [slow_pool(image, bins) for image in x], rtol=0, atol=1e-6)
    np.testing.assert_allclose(resized, [slow_resize(image, new) for image in x], rtol=0, atol=1e-6)
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(x).permute(0, 3, 1, 2)
    theirs = torch.nn.functional.adaptive_avg_pool2d(tensor, bins).permute(0, 2, 3, 1)
    np.testing.assert_allclose(pooled, theirs, rtol=0, atol=1e-6)
    theirs = torch.nn.functional.interpolate(tensor, new, mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
    np.testing.assert_allclose(resized, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("channels, published", [(768, 72.5), (512, 37.1), (256, 14.7)])
def test_upernet_has_the_parameters_of_its_parts(channels, published):
    """Published, in millions: UperNet on InfMAE-Base with the convolution to stride 32."""
    encoder = variant("base", fuse_stages=False).encoder
    model = Segmenter(encoder, SegmentationHeadConfig(channels=channels), 9)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 1)))["params"]

    def conv(size, before, after):
        return size**2 * before * after + 2 * after

    c = channels
    head = 4 * conv(1, 768, c) + conv(3, 768 + 4 * c, c) + sum(conv(1, w, c) for w in (256, 384, 768))
    head += 3 * conv(3, c, c) + conv(3, 4 * c, c) + 9 * (c + 1)
    sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in params.items()}
    assert sizes["head"] == head and sizes["stride32"] == conv(3, 768, 768)
    assert round((sizes["head"] + sizes["stride32"]) / 1e6, 1) == published
    assert sizes["auxiliary"] == conv(3, 768, 256) + 9 * 257
    assert set(params) == {"encoder", "stride32", "head", "auxiliary"}


IMAGES = np.random.default_rng(0).standard_normal((2, 48, 80, 1)).astype(np.float32)


UPERNET = SegmentationHeadConfig(channels=16, auxiliary_channels=8)


@pytest.mark.parametrize("head, fuse_stages", [
    (UPERNET, True),
    (SegmentationHeadConfig("fcn", 16, auxiliary_weight=0), False),
    (SegmentationHeadConfig("fcn", 16, fcn_stage=4, auxiliary_weight=0), False),
])  # fmt: skip
def test_the_model_is_encoder_and_heads(head, fuse_stages):
    encoder = dataclasses.replace(ENCODER, fuse_stages=fuse_stages)
    model = Segmenter(encoder, head, CLASSES)
    params = randomised(model, IMAGES)

    @jax.jit
    def both(params):
        options = {"method": "features", "fuse_stages": fuse_stages}
        found = HybridEncoder(encoder).apply({"params": params["encoder"]}, IMAGES, **options)
        maps = [found[f"stage{i}"] for i in (1, 2, 3)]
        if "stride32" in params:
            maps.append(Stride32("group", "float32").apply({"params": params["stride32"]}, maps[2]))
        if head.kind == "upernet":
            modules = {"head": (UperNet(head, CLASSES, "float32"), maps)}
        else:
            modules = {"head": (FCN(16, 2, True, head, CLASSES, "float32"), maps[head.fcn_stage - 1])}
        if head.auxiliary_weight:
            modules["auxiliary"] = (FCN(8, 1, False, head, CLASSES, "float32"), maps[2])
        parts = {name: module.apply({"params": params[name]}, x) for name, (module, x) in modules.items()}
        return model.apply({"params": params}, IMAGES), parts

    out, parts = both(params)
    np.testing.assert_allclose(out.pop("logits"), parts.pop("head"), rtol=0, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4), out, parts)


@pytest.mark.parametrize("head, parts, shape", [
    (UPERNET, {"head", "stride32", "auxiliary"}, (12, 20)),
    (SegmentationHeadConfig("fcn", fcn_stage=1), {"head", "auxiliary"}, (12, 20)),
    (SegmentationHeadConfig("fcn", fcn_stage=2, auxiliary_weight=0), {"head"}, (6, 10)),
    (SegmentationHeadConfig("fcn", fcn_stage=3), {"head", "auxiliary"}, (3, 5)),
    (SegmentationHeadConfig("fcn", fcn_stage=4), {"head", "stride32", "auxiliary"}, (1, 2)),
])  # fmt: skip
def test_parts_and_shapes(head, parts, shape):
    """Prediction needs no auxiliary head, neither its parameters nor its work."""
    model = Segmenter(ENCODER, head, CLASSES)
    out, variables = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), IMAGES))
    assert set(variables["params"]) == {"encoder", *parts}
    shapes = {name: logits.shape for name, logits in out.items()}
    assert shapes.pop("logits") == (2, *shape, CLASSES)
    assert shapes == ({"auxiliary": (2, 3, 5, CLASSES)} if "auxiliary" in parts else {})
    variables["params"].pop("auxiliary", None)
    predict = functools.partial(model.apply, auxiliary=False)
    assert set(jax.eval_shape(predict, variables, IMAGES)) == {"logits"}


def test_gradients_reach_all_parameters():
    model = Segmenter(ENCODER, UPERNET, CLASSES)
    params = randomised(model, IMAGES)

    def loss(params):
        rngs = {"dropout": jax.random.key(0), "drop_path": jax.random.key(1)}
        out = model.apply({"params": params}, IMAGES, rngs=rngs)
        return sum(jnp.square(logits).sum() for logits in out.values())

    grads = jax.jit(jax.grad(loss))(params)
    grads["encoder"].pop("norm")  # only the pooled feature reads it
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(grad).all() and np.abs(grad).max() > 0, jax.tree_util.keystr(path)


def test_dropout_takes_whole_channels_and_only_with_its_stream():
    x = np.random.default_rng(0).uniform(1, 2, (8, 3, 4, 64)).astype(np.float32)
    module = Output(64, 0.01, 0.25)
    params = {"params": {"kernel": np.eye(64, dtype=np.float32), "bias": np.zeros(64, np.float32)}}
    np.testing.assert_allclose(module.apply(params, x), x, rtol=1e-6)
    ratio = np.asarray(module.apply(params, x, rngs={"dropout": jax.random.key(0)})) / x
    dropped = (ratio == 0).all(axis=(1, 2))
    np.testing.assert_allclose(ratio.transpose(0, 3, 1, 2)[~dropped], 4 / 3, rtol=1e-6)
    assert 0.15 < dropped.mean() < 0.35 and len(np.unique(dropped, axis=0)) == 8


def test_bfloat16_keeps_parameters_and_logits_in_float32():
    half = Segmenter(dataclasses.replace(ENCODER, dtype="bfloat16"), UPERNET, CLASSES)
    params = randomised(half, IMAGES)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    exact = Segmenter(ENCODER, UPERNET, CLASSES)
    out, exact = jax.jit(lambda p: [model.apply({"params": p}, IMAGES) for model in (half, exact)])(params)
    for name, logits in out.items():
        assert logits.dtype == jnp.float32
        np.testing.assert_allclose(logits, exact[name], rtol=0, atol=0.1 * np.abs(exact[name]).max())


def test_a_vit_has_stage_3_alone():
    encoder = EncoderConfig("vit", 1, (16, 16, 16), (1, 1, 1), heads=2, fuse_stages=False)
    model = Segmenter(encoder, SegmentationHeadConfig("fcn", 16), CLASSES)
    out = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), IMAGES)[0])
    assert out["logits"].shape == out["auxiliary"].shape == (2, 3, 5, CLASSES)
    for head, fuse_stages, message in (
        (SegmentationHeadConfig(), False, "model.head.kind=upernet reads stages that a vit encoder lacks"),
        (SegmentationHeadConfig("fcn", fcn_stage=2), False, "model.head.fcn_stage=2 reads stages"),
        (SegmentationHeadConfig("fcn"), True, "fuse_stages adds stages 1 and 2, which a vit encoder lacks"),
    ):
        with pytest.raises(ValueError, match=message):
            other = dataclasses.replace(encoder, fuse_stages=fuse_stages)
            jax.eval_shape(Segmenter(other, head, CLASSES).init, jax.random.key(0), IMAGES)


@pytest.mark.parametrize("change, message", [
    (dict(kind="unet"), "kind='unet' must be one of upernet, fcn"),
    (dict(channels=4), "channels=4 must be in .8, inf."),
    (dict(norm="batch"), "norm='batch' must be one of group, layer"), (dict(dropout=1.0), "dropout=1.0"),
    (dict(auxiliary_weight=-0.1), "auxiliary_weight=-0.1"), (dict(auxiliary_channels=0), "auxiliary_channels=0"),
    (dict(fcn_stage=5), "fcn_stage=5 must be in .1, 4."), (dict(fcn_convs=0), "fcn_convs=0"),
    (dict(pool_scales=(1, 1)), "pool_scales=.1, 1."), (dict(pool_scales=(0,)), "pool_scales=.0,."),
])  # fmt: skip
def test_impossible_heads_are_refused(change, message):
    with pytest.raises(ValueError, match=f"model.head.{message}"):
        SegmentationHeadConfig(**change)
