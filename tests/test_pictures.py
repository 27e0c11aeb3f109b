"""Pictures: the pixels of a panel against a slow reference, files that are whole or absent."""

import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from PIL import Image

from data_pipelines.errors import InputError
from data_pipelines.sheets import GAP, HEADING, LINE
from infmae_jax import pictures


def example(batch=2, h=3, w=12, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (batch, 16 * h, 16 * w), dtype=np.uint8)
    ids_keep = np.stack([rng.permutation(h * w)[:9] for _ in range(batch)]).astype(np.int32)
    pred = rng.normal(0, 1.2, (batch, h * w, 256 * channels)).astype(np.float32)
    return images, ids_keep, pred, rng.normal(size=(batch, h * w))


def slow_pixels(images, pred, norm_pix):
    """Patch by patch, pixel by pixel."""
    batch, _, width = images.shape
    columns, channels = width // 16, pred.shape[-1] // 256
    out = np.zeros(images.shape, np.uint8)
    for b in range(batch):
        for token in range(pred.shape[1]):
            top, left = 16 * (token // columns), 16 * (token % columns)
            vector = pred[b, token].astype(float)
            if norm_pix:
                inside = images[b, top : top + 16, left : left + 16].reshape(-1)
                values = [(v / 255 - 0.425) / 0.2 for v in inside for _ in range(channels)]
                mean = sum(values) / len(values)
                variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
                vector = vector * (variance + 1e-6) ** 0.5 + mean
            for pixel in range(256):
                gray = sum(vector[pixel * channels : (pixel + 1) * channels]) / channels
                level = round((gray * 0.2 + 0.425) * 255)
                out[b, top + pixel // 16, left + pixel % 16] = min(255, max(0, level))
    return out


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("norm_pix", [False, True])
def test_reconstructed_pixels(norm_pix, channels):
    images, _, pred, _ = example(channels=channels)
    fast = pictures.reconstructed_pixels(images, pred, norm_pix).astype(int)
    assert np.max(np.abs(fast - slow_pixels(images, pred, norm_pix))) <= 1  # rounding of sums
    assert np.mean(fast != slow_pixels(images, pred, norm_pix)) < 1e-3


@pytest.mark.parametrize("norm_pix", [False, True])
def test_the_target_itself_comes_back(norm_pix):
    images, _, _, _ = example()
    batch, height, width = images.shape
    levels = (images / 255 - 0.425) / 0.2
    target = np.stack([levels[:, y : y + 16, x : x + 16].reshape(batch, 256)
                       for y in range(0, height, 16) for x in range(0, width, 16)], axis=1)  # fmt: skip
    if norm_pix:
        target = (target - target.mean(-1, keepdims=True)) / np.sqrt(target.var(-1, ddof=1, keepdims=True) + 1e-6)
    assert np.array_equal(pictures.reconstructed_pixels(images, target, norm_pix), images)


@pytest.mark.parametrize("colormap", ["inferno", "gray"])
def test_panel_cells(tmp_path, colormap):
    images, ids_keep, pred, scores = example()
    path = tmp_path / "new" / "panel.png"
    panel = pictures.reconstruction_panel(images, ids_keep, pred, scores, False, path, colormap=colormap)
    assert np.array_equal(np.asarray(Image.open(path)), panel)
    assert [p.name for p in path.parent.iterdir()] == ["panel.png"]
    batch, height, width = images.shape
    below = GAP + LINE
    assert panel.shape == (HEADING + batch * (height + below), 5 * (width + GAP) + GAP, 3)

    def cell(row, column):
        top, left = HEADING + row * (height + below), GAP + column * (width + GAP)
        return panel[top : top + height, left : left + width].astype(int)

    table = np.rint(matplotlib.colormaps[colormap](np.arange(256))[:, :3] * 255).astype(int)
    rebuilt = pictures.reconstructed_pixels(images, pred, False)
    for row in range(batch):
        # Agg may round a colour by one level.
        assert np.max(np.abs(cell(row, 0) - table[images[row]])) <= 1
        assert np.max(np.abs(cell(row, 2) - table[rebuilt[row]])) <= 1
        for token in range(scores.shape[1]):
            y, x = 16 * (token // (width // 16)), 16 * (token % (width // 16))
            window = (slice(y, y + 16), slice(x, x + 16))
            visible = token in ids_keep[row]
            veiled, pasted = cell(row, 1)[window], cell(row, 3)[window]
            source = images if visible else rebuilt
            assert np.max(np.abs(pasted - table[source[row][window]])) <= 1
            if visible:
                assert np.max(np.abs(veiled - table[images[row][window]])) <= 1
            else:
                assert np.ptp(veiled.reshape(-1, 3), axis=0).max() == 0
            low, high = scores[row].min(), scores[row].max()
            level = round((scores[row, token] - low) / (high - low) * 255)
            middle = cell(row, 4)[y + 7 : y + 9, x + 7 : x + 9]
            assert np.max(np.abs(middle - table[level])) <= 1
            frame = cell(row, 4)[y + 1, x + 8]
            assert (np.max(np.abs(frame - table[level])) > 12) == visible


def test_panel_takes_integer_and_constant_scores_and_a_diverged_model(tmp_path):
    images, ids_keep, pred, _ = example()
    pred[0, 0] = np.nan
    for scores in (np.zeros(pred.shape[:2], np.float32), np.full(pred.shape[:2], 7, np.uint32)):
        panel = pictures.reconstruction_panel(images, ids_keep, pred, scores, True, tmp_path / "p.png")
        assert panel.dtype == np.uint8


def test_panel_refuses(tmp_path):
    images, ids_keep, pred, scores = example()
    with pytest.raises(InputError, match="jet.*inferno, gray"):
        pictures.reconstruction_panel(images, ids_keep, pred, scores, False, tmp_path / "p.png", colormap="jet")
    with pytest.raises(ValueError, match="do not fit"):
        pictures.reconstruction_panel(images[:, :40], ids_keep, pred, scores, False, tmp_path / "p.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        pictures.reconstruction_panel(images, ids_keep, pred, scores, False, tmp_path / "file" / "p.png")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def colours(picture, colour):
    """Where a picture has about this colour, (rows, columns) bool."""
    return np.abs(picture.astype(int) - colour).max(axis=-1) < 4


def test_metric_curve_draws_its_points_where_they_are():
    """A line from low left to high right, a gap in it, a lone point, and a mark."""
    series = np.array([(s, np.nan if 12 <= s <= 18 and s != 15 else 2.0 * s) for s in range(31)])
    picture = pictures.metric_curve(series, {"resume": [20]}, (0, 30))
    line, mark = (colours(picture, colour) for colour in ((140, 45, 4), (31, 119, 180)))
    columns = np.flatnonzero(line.any(axis=0))
    heights = [np.flatnonzero(line[:, column]).mean() for column in columns]
    assert (np.diff(heights) <= 0.5).all() and heights[0] - heights[-1] > 300
    gaps = np.diff(columns)
    assert (gaps > 40).sum() == 2  # on both sides of the lone point at 15
    width = columns[-1] - columns[0]
    assert np.flatnonzero(mark.any(axis=0)).mean() == pytest.approx(columns[0] + width * 20 / 30, abs=4)


def test_a_spike_among_very_many_points_is_drawn():
    values = np.ones(100_000)
    plain = pictures.metric_curve(np.c_[np.arange(100_000), values], {}, (0, 100_000))
    values[77_777] = 5.0
    spiked = pictures.metric_curve(np.c_[np.arange(100_000), values], {}, (0, 100_000))
    assert colours(spiked, (217, 160, 122)).any(axis=1).sum() > 5 * colours(plain, (217, 160, 122)).any(axis=1).sum()


@pytest.mark.parametrize("values", [[5.0], [1e300, -1e300], [1.7e308, 1.0], [3.0] * 50, [np.nan, 1e-12]])
def test_curves_of_odd_values(values):
    picture = pictures.metric_curve(np.c_[np.arange(len(values)), values], {}, (0, 0))
    assert picture.shape == (480, 840, 3) and len(np.unique(picture)) > 2


@pytest.mark.parametrize("classes", [1, 2, 7, 40])
def test_confusion_matrix(classes):
    """Every class is always taken for the next one: cells beside the diagonal are dark, all others are light."""
    names = [f"class {i} " + "x" * (i % 5) for i in range(classes)]
    matrix = np.roll(np.eye(classes, dtype=int) * np.arange(1, classes + 1), 1, axis=1)
    image = pictures.confusion_matrix(matrix, names)
    assert max(image.shape) < 2000
    for edge in (image[0], image[-1], image[:, 0], image[:, -1]):
        assert edge.min() == 255  # nothing is cut off at the border
    dark, light = (colours(image, np.rint(np.array(matplotlib.colormaps["Blues"](v)[:3]) * 255)) for v in (1.0, 0.0))
    top, bottom = np.flatnonzero((dark | light).sum(axis=1) > 50)[[0, -1]]
    left, right = np.flatnonzero((dark | light).sum(axis=0) > 50)[[0, -1]]
    for row, column in np.ndindex(matrix.shape):
        y = round(top + (bottom - top) * (row + 0.2) / classes)  # above the count in the middle
        x = round(left + (right - left) * (column + 0.2) / classes)
        assert (dark if matrix[row, column] else light)[y, x], (row, column)
    with pytest.raises(ValueError, match="class names"):
        pictures.confusion_matrix(np.zeros((2, 3)), ["a", "b"])


def test_class_names_are_drawn_as_they_are():
    """Markup that matplotlib cannot parse, changes of direction, control characters, scripts without glyphs."""
    names = ["$\\frac{a", "US$ and A$", "\u202egnp.exe", "\x1b[31m", "a\nb", "\u6797", "\ud800", "<b>&"]
    pictures.confusion_matrix(np.eye(len(names)), names)
    assert pictures.printable("a\u202eb\nc\x1b\ud800 d\u00e9") == "a\\u202eb\\u000ac\\u001b\\ud800 d\u00e9"


def test_matplotlib_is_loaded_only_to_draw():
    code = "import sys, infmae_jax.pictures; print('matplotlib' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert output.stdout.strip() == "False"


def test_the_legend_names_class_0_without_a_colour():
    classes = np.zeros((40, 60), np.uint8)
    drawn = np.asarray(pictures.class_overlay(np.full((40, 60), 100, np.uint8), classes, ["sky", "road"]))
    assert (drawn[:40, :60] == 100).all()
    below = drawn[40:]
    assert (below < 128).any() and (np.ptp(below.astype(int), axis=-1) == 0).all()  # a name, in black on white
