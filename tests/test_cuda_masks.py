"""The CUDA kernels' choice of tiles and element masks, compiled for the host: needs no GPU."""

from tests import host


def test_tiles_and_masks_agree_with_the_definition(tmp_path):
    host.run("masks_test", tmp_path)
