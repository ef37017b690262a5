"""Canny edges as the ControlNets in use expect them: white on black, not blurred, three equal channels."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

LOW, HIGH = 100, 200


def make(picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """uint8 RGB [H, W, 3] -> uint8 [H, W, 3], 255 on edges; J. Canny, IEEE PAMI 8(6), 1986, by OpenCV."""
    edges = cv2.Canny(picture, LOW, HIGH)
    return np.repeat(edges[:, :, None], 3, axis=2).astype(np.uint8)
