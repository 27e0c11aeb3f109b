"""Images from public bug reports: the right values, or the right refusal."""

import numpy as np
import pytest

from data_pipelines.decode import ImageRefused, decode_image, read_image_file
from data_pipelines.errors import InputError


@pytest.fixture(scope="session")
def field_cases(shared_folder):
    folder = shared_folder / "field_cases"
    if not folder.is_dir():
        pytest.skip("no field cases beside the real images")
    return folder


READ = {
    "flir_big_endian_record/png_in_standard_order.jpg": ((120, 120), 11350, 12679),
    "jpeg_harmless_warnings/jfif_0_02.jpg": ((512, 640), 0, 250),
    "jpeg_harmless_warnings/restart_stray.jpg": ((512, 640), 0, 250),
    "png_large_metadata/itxt2MB.png": ((240, 320), 12258, 17483),
    "png_large_metadata/ztxt2MB.png": ((240, 320), 12258, 17483),
    "tiff_big_endian_compressed/f32_be_lzw_strip_nopred.tif": ((240, 320), 217.17, 426.17),
    "tiff_big_endian_compressed/i16_be_zlib_strip_nopred.tif": ((240, 320), -2742, 2483),
    "tiff_bigtiff/u16_bigtiff.tif": ((240, 320), 12258, 17483),
    "tiff_int8/i8_le_None_strip_nopred.tif": ((240, 320), -33, 8),
    "tiff_nodata/nodata_-9999.tif": ((240, 320), 292.58, 344.83),
    "tiff_sound_refused/f64_le_None_strip_nopred.tif": ((240, 320), 217.17, 426.17),
    "tiff_sound_refused/packed14.tif": ((240, 320), 2258, 7483),
    "tiff_thumbnail_first/thumb_first.tif": ((240, 320), 12258, 17483),
}


@pytest.mark.parametrize("name", READ)
def test_read(field_cases, name):
    shape, low, high = READ[name]
    image = decode_image((field_cases / name).read_bytes())
    scale = image.attributes.get("scale", 1.0)
    values = image.pixels * scale + image.attributes.get("offset", 0.0)
    tolerance = 0 if scale == 1 else scale / 2
    assert values.shape == shape
    assert (values.min(), values.max()) == (pytest.approx(low, abs=tolerance), pytest.approx(high, abs=tolerance))
    truth = np.load(field_cases / "tiff_truth.npz")
    stem = name.split("/")[-1].removesuffix(".tif")
    if stem in truth.files:
        np.testing.assert_allclose(values, truth[stem], atol=tolerance, rtol=0)
    assert read_image_file(field_cases / name).shape == shape


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("dji_rjpeg/DJI_0001_R.JPG", "radiometric_unreadable"),
        ("tiff_sound_refused/twoband_f32.tif", "unsupported_depth"),
    ],
)
def test_refused_by_name(field_cases, name, reason):
    with pytest.raises(ImageRefused) as refusal:
        decode_image((field_cases / name).read_bytes())
    assert refusal.value.reason == reason
    with pytest.raises(InputError, match=reason):
        read_image_file(field_cases / name)


def test_a_real_camera_with_a_big_endian_record(shared_folder):
    image = decode_image((shared_folder / "data/flir/07_BillHotFlashThermography.jpg").read_bytes())
    assert image.pixels.shape == (240, 320) and (image.pixels.min(), image.pixels.max()) == (6525, 7302)
    camera = image.attributes["camera"]
    shifted = camera["planck_r2"] * (image.pixels + camera["planck_o"])
    kelvin = camera["planck_b"] / np.log(camera["planck_r1"] / shifted + camera["planck_f"])
    # A person in a room.
    assert 285 < kelvin.min() and kelvin.max() < 312
